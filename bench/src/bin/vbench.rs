//! The program `vbench`.

fn main() -> std::process::ExitCode {
    vbench::main()
}
