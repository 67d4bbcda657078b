//! Tells files that are run here that they are.

fn main() {
    println!("cargo::rustc-cfg=kickless_model");
}
