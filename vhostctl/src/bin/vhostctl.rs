//! The program `vhostctl`.

fn main() -> std::process::ExitCode {
    vhostctl::main()
}
