//! Prints how far predictions are from published measurements, by group.
//!
//! `cargo run --release -p moec-plan --example accuracy [-- rows]`

#[path = "published/mod.rs"]
mod published;

use moec_plan::calibration::TrainCalibration;

fn main() {
    let verbose = std::env::args().any(|a| a == "rows");
    let calibration = match std::env::args().nth(2) {
        Some(path) => TrainCalibration::from_json(&std::fs::read_to_string(path).expect("file")).expect("calibration"),
        None => TrainCalibration::built_in().expect("calibration").clone(),
    };
    let (rows, skipped) = published::rows();
    let mut groups = published::Errors::new();
    let mut memory_wrong = Vec::new();
    let fit = published::fit_rows(&rows);
    for (row, fit) in rows.iter().zip(fit) {
        let predicted = match published::predict(row, &calibration) {
            Ok(p) => p,
            Err(e) => {
                println!("{} {} {:?}: {e}; {}", row.id, row.model_name, row.request.fixed, e.help);
                continue;
            }
        };
        let oom = matches!(row.measured, published::Measured::OutOfMemory);
        if oom == predicted.feasible {
            memory_wrong.push(format!(
                "{} {} {} needs {:.1} GiB",
                row.id,
                row.group,
                row.model_name,
                predicted.candidate.estimate.memory.total() / 1_073_741_824.0
            ));
        }
        let part = if fit { "fit" } else { "held out" };
        if let Some(error) = published::error(row, &predicted) {
            groups.entry((row.group, part)).or_default().push(error);
            groups.entry((row.group, "all")).or_default().push(error);
        }
        if verbose {
            let c = &predicted.candidate;
            let t = &c.estimate.times;
            let total = t.total();
            let share = |x: f64| format!("{:>3.0}", 100.0 * x / total);
            println!(
                "{:<26} {:<8} {:<17} {:<22} {:<12} {:<13} g{:<5} b{:<5} tp{} cp{} pp{} ep{} etp{} v{} {:?} mem {:>4.0} err {:>+6.1}% pred {:.3} {:?} | {} bub {} pp {} dp {} opt {} st {}",
                row.id,
                part,
                row.group,
                row.model_name,
                row.cluster.name,
                row.request.software,
                row.request.gpus,
                row.request.global_batch,
                c.choice.mapping.tp,
                c.choice.mapping.cp,
                c.choice.mapping.pp,
                c.choice.mapping.ep,
                c.choice.mapping.etp,
                c.choice.vpp,
                c.choice.recompute,
                c.estimate.memory.total() / 1_073_741_824.0,
                100.0 * published::error(row, &predicted).unwrap_or(f64::NAN),
                predicted.value,
                row.measured,
                t.kinds.iter().map(|k| share(*k)).collect::<Vec<_>>().join(""),
                share(t.bubble),
                share(t.pipeline_comm),
                share(t.data_comm),
                share(t.optimizer),
                share(t.straggler)
            );
        }
    }
    print!("{}", published::table(&groups));
    print!("{}", published::best_mappings(&rows, &calibration));
    println!("memory verdict wrong: {}", memory_wrong.len());
    memory_wrong.iter().for_each(|m| println!("  {m}"));
    println!("rows not used: {}", skipped.len());
    skipped.iter().for_each(|s| println!("  {}: {}", s.id, s.reason));
}
