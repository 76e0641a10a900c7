//! The serving model against 1,420 measured points, on the half that the fit did not see.

#[path = "../examples/published/mod.rs"]
mod published;
#[path = "../examples/silicon/mod.rs"]
mod silicon;

use moec_plan::backend::ServeFile;
use std::collections::BTreeMap;

#[test]
fn held_out_points_meet_the_accuracy_limits() {
    let file = ServeFile::built_in().unwrap();
    let points = silicon::points(&published::models());
    assert_eq!(points.len(), 1420);
    println!("{}", silicon::HEAD);
    for fit in [true, false] {
        let part = if fit { "fit" } else { "held out" };
        let (mut tpot, mut ttft) = (Vec::new(), Vec::new());
        for (key, set) in &file.sets {
            let before = tpot.len();
            for point in points.iter().filter(|p| p.fit == fit && p.set == *key) {
                let e = silicon::predict(point, set);
                tpot.push(e.tpot * 1e3 / point.tpot_ms - 1.0);
                ttft.push(e.ttft * 1e3 / point.ttft_ms - 1.0);
            }
            println!("{}", silicon::line(key, part, &tpot[before..], &ttft[before..]));
        }
        println!("{}", silicon::line("all", part, &tpot, &ttft));
        let (median, mean, within, rows) = silicon::summary(&tpot);
        assert!(rows > 600);
        assert!(median <= 0.12 && mean <= 0.18 && within >= 0.75, "TPOT median {median} mean {mean} within {within}");
        let (_, mean, ..) = silicon::summary(&ttft);
        assert!(mean <= 0.40, "TTFT mean {mean}");
    }
}

/// The reading of squared layouts rests on measurements that occur in both forms.
#[test]
fn squared_layouts_repeat_measurements_of_plain_ones() {
    let mut lines = silicon::SILICON.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    let mut forms: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for line in lines {
        let row: BTreeMap<&str, &str> = header.iter().copied().zip(line.split(',')).collect();
        let int = |key: &str| row[key].parse::<u64>().unwrap_or(0);
        let (tp, dp, etp, ep) = (int("tp_size"), int("attention_dp_size"), int("moe_tp_size"), int("moe_ep_size"));
        let squared = (etp == ep && ep > 1 && dp >= 1 && tp * dp == ep * ep) || (dp > 1 && tp == dp && ep == dp * dp);
        let measured = ["model_path", "system", "backend", "isl", "osl", "measured_ttft_ms"].map(|k| row[k]).join(",");
        // One of the sources prints four digits, the other three decimals.
        let tpot = format!("{:.2}", row["measured_tpot_ms"].parse::<f64>().unwrap());
        forms.entry(measured + &tpot).or_default()[usize::from(squared)] += 1;
    }
    let both = forms.values().filter(|f| f[0] > 0 && f[1] > 0).count();
    assert!(both >= 40, "{both} measurements occur in both forms");
}

#[test]
fn shares_of_every_parameter_set_stay_below_the_hardware() {
    for (name, p) in &ServeFile::built_in().unwrap().sets {
        for share in [
            p.dense_memory,
            p.expert_memory,
            p.cache_memory,
            p.dense_flops,
            p.expert_flops,
            p.attention_flops,
            p.link,
            p.memory_share,
        ] {
            assert!(share > 0.0 && share <= 1.0, "{name}: {share}");
        }
    }
}
