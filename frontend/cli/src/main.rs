//! The `moec` binary.
use std::sync::Arc;
fn main() {
    let bench = moec::verify::Bench { device: Arc::new(moec::runtime::Cpu::new(2)), target: moec::host_target() };
    let mut failed = 0;
    for arg in std::env::args().skip(1) {
        let r = moec::verify::case(std::path::Path::new(&arg), &bench);
        if r.status != moec::verify::Status::Pass { failed += 1; println!("{:?} {} {:?}", r.status, r.name, r.reason); }
        else { println!("PASS {} {:.1e} {:.1e}", r.name, r.out_max_rel.unwrap_or(0.0), r.out_rms_rel.unwrap_or(0.0)); }
    }
    println!("{failed} failed");
}
