//! Processor levels: which compiled variants this machine can run, and which is best.

/// Whether this machine's processor runs code for `target`, and why not.
pub fn cpu_runs(target: &str) -> Result<(), String> {
    let missing = |needed: &[(&str, bool)]| {
        let lacks: Vec<&str> = needed.iter().filter(|(_, has)| !has).map(|(name, _)| *name).collect();
        if lacks.is_empty() { Ok(()) } else { Err(format!("the processor lacks {}", lacks.join(", "))) }
    };
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        let v3 = [
            ("avx", has!("avx")),
            ("avx2", has!("avx2")),
            ("bmi1", has!("bmi1")),
            ("bmi2", has!("bmi2")),
            ("f16c", has!("f16c")),
            ("fma", has!("fma")),
            ("lzcnt", has!("lzcnt")),
            ("movbe", has!("movbe")),
        ];
        let v4 = [
            ("avx512f", has!("avx512f")),
            ("avx512bw", has!("avx512bw")),
            ("avx512cd", has!("avx512cd")),
            ("avx512dq", has!("avx512dq")),
            ("avx512vl", has!("avx512vl")),
        ];
        match target {
            "x86-64" => return Ok(()),
            "x86-64-v3" => return missing(&v3),
            "x86-64-v4" => return missing(&[&v3[..], &v4].concat()),
            "x86-64-v4-bf16" => {
                let pairs = [("avx512_bf16", has!("avx512bf16")), ("avx512_vbmi", has!("avx512vbmi"))];
                return missing(&[&v3[..], &v4, &pairs].concat());
            }
            "x86-64-v4-amx" => {
                missing(&[&v3[..], &v4].concat())?;
                let granted = moec_launch::processor::reaches(6);
                return missing(&[("amx-bf16, or the system does not grant it", granted)]);
            }
            _ => {}
        }
    }
    let _ = missing;
    if target == "aarch64" && cfg!(target_arch = "aarch64") {
        return Ok(());
    }
    Err(format!("this is a {} processor", std::env::consts::ARCH))
}

/// How good a CPU target is among those that run; larger is better.
pub(crate) fn cpu_rank(target: &str) -> u32 {
    match target {
        "x86-64-v4-amx" => 6,
        "x86-64-v4-bf16" => 5,
        "x86-64-v4" => 4,
        "x86-64-v3" => 3,
        "aarch64" => 2,
        "x86-64" => 1,
        _ => 0,
    }
}

/// Number of a GPU target and whether it is bound to that architecture: `sm_90a` is `(90, true)`.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) fn gpu_number(target: &str) -> Option<(u32, bool)> {
    let text = target.strip_prefix("sm_")?;
    let (digits, exact) = match text.strip_suffix(['a', 'f']) {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    Some((digits.parse().ok()?, exact))
}

/// How good a GPU target is among those that run; larger is better.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) fn gpu_rank(target: &str) -> u32 {
    gpu_number(target).map_or(0, |(number, exact)| 2 * number + u32::from(exact))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_processors_are_refused_with_the_reason() {
        let foreign = if cfg!(target_arch = "x86_64") { "aarch64" } else { "x86-64-v3" };
        assert_eq!(cpu_runs(foreign), Err(format!("this is a {} processor", std::env::consts::ARCH)));
        assert!(cpu_runs("sm_90a").is_err());
    }
}
