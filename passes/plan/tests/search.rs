//! The search: speed, determinism, refusals, objectives, and the report page.

use moec_plan::{
    Cluster, Mapping, ModelShape, Objective, PlanError, Precision, Request, Routing, Schedule, Strategy,
    calibration::TrainCalibration, html::html, plan, plan_report, ranks::Layout, search::search_training,
};
use std::collections::BTreeMap;

fn config(name: &str) -> ModelShape {
    let path = format!("{}/tests/data/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    ModelShape::from_config_json(&serde_json::from_str(&text).unwrap()).unwrap()
}

fn h100() -> Cluster {
    Cluster::preset("dgx-h100").unwrap()
}

#[test]
fn every_real_configuration_is_read_with_the_published_number_of_parameters() {
    let known = [
        ("mixtral-8x7b", 46.7),
        ("deepseek-v3", 671.0),
        ("deepseek-v2", 235.7),
        ("dbrx", 131.6),
        ("qwen3-30b-a3b", 30.5),
        ("gpt-oss-120b", 116.8),
        ("kimi-k2", 1026.0),
        ("qwen2-57b-a14b", 57.4),
        ("olmoe-1b-7b", 6.9),
        ("phi-3.5-moe", 41.9),
        ("qwen1.5-moe-a2.7b", 14.3),
        ("qwen3-next-80b-a3b", 80.0),
        ("glm-4.5-air", 107.0),
        ("minimax-m2", 229.0),
        ("hunyuan-a13b", 80.4),
        ("llama4-maverick", 400.0),
    ];
    for (name, billions) in known {
        let found = config(name).parameters() / 1e9;
        assert!((found / billions - 1.0).abs() < 0.03, "{name}: {found:.1}");
    }
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/configs")).unwrap() {
        let name = file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        assert!(config(&name).experts() > 1, "{name}");
    }
}

#[test]
fn deepseek_v3_is_planned_with_few_evaluations_on_1024_and_16384_gpus() {
    let model = config("deepseek-v3");
    for gpus in [1024, 16384] {
        let report = plan_report(&model, &h100(), &Request::train(gpus, 4096, gpus * 8)).unwrap();
        // 200,000 take about a second on one core.
        assert!(report.evaluated < 200_000, "{gpus} GPUs took {} evaluations", report.evaluated);
        assert_eq!(report.plans.len(), 5);
        assert!(report.plans.iter().all(|p| p.feasible));
    }
}

#[test]
fn a_million_token_batch_on_65536_gpus_is_answered() {
    let plans = plan(&config("deepseek-v3"), &h100(), &Request::train(65536, 4096, 256)).unwrap();
    assert!(plans[0].step_ms > 0.0);
}

#[test]
fn the_bound_never_loses_the_best_plan_and_results_repeat() {
    let calibration = TrainCalibration::built_in().unwrap();
    for (name, gpus) in [("mixtral-8x7b", 32), ("qwen3-30b-a3b", 24)] {
        let model = config(name);
        let request = Request::train(gpus, 4096, gpus * 4);
        let few = search_training(&model, &h100(), calibration, &request, 3).unwrap();
        let many = search_training(&model, &h100(), calibration, &request, 1_000_000).unwrap();
        assert!(few.pruned > 0 && many.pruned == 0);
        assert_eq!(few.best, many.best[..3]);
        assert_eq!(few.best, search_training(&model, &h100(), calibration, &request, 3).unwrap().best);
    }
}

#[test]
fn plans_say_why_they_lost_and_what_else_could_be() {
    let report = plan_report(&config("mixtral-8x7b"), &h100(), &Request::train(64, 4096, 256)).unwrap();
    assert!(report.plans[0].why.is_none());
    assert!(
        report.plans[1..].iter().all(|p| p.why.as_ref().is_some_and(|w| w.contains("slower") || w.contains("as fast")))
    );
    assert!(report.sensitivity.iter().any(|s| s.text.contains("GiB")));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["schema"], 1);
    for key in [
        "attention",
        "experts",
        "micro_batch",
        "vpp",
        "step_ms",
        "mfu",
        "tokens_per_s_per_gpu",
        "memory_gib",
        "feasible",
        "time_ms",
    ] {
        assert!(!json["plans"][0][key].is_null(), "{key}");
    }
}

#[test]
fn a_plan_tells_each_rank_its_experts_and_layers() {
    let plan = &plan(&config("mixtral-8x7b"), &h100(), &Request::train(64, 4096, 256)).unwrap()[0];
    let groups = plan.groups().unwrap();
    assert_eq!(groups.dp, plan.attention.dp);
    let ranks: Vec<_> = (0..64).map(|r| plan.rank(r).unwrap()).collect();
    let held: u64 = ranks
        .iter()
        .filter(|r| r.experts.etp == 0 && r.experts.edp == 0 && r.experts.pp == 0)
        .map(|r| r.local_experts.end - r.local_experts.start)
        .sum();
    assert_eq!(held, 8);
    let layers: usize = ranks
        .iter()
        .filter(|r| r.attention.tp + r.attention.cp + r.attention.dp == 0)
        .flat_map(|r| &r.layers)
        .map(|(a, b)| b - a)
        .sum();
    assert_eq!(layers, 32);
    assert!(plan.rank(64).is_err());
    // Ranks read the mapping from what is printed; only what is misspelt means nothing to them.
    let text = serde_json::to_string(plan).unwrap();
    assert!(Layout::unread(&text).is_empty(), "{:?}", Layout::unread(&text));
    let misspelt = Layout::unread(&text.replace("\"order\"", "\"ordre\"").replace("\"etp\"", "\"etpp\""));
    assert_eq!(misspelt.iter().map(|(member, _)| member.as_str()).collect::<Vec<_>>(), ["experts.etpp", "ordre"]);
}

#[test]
fn pinned_sizes_strategies_and_limits_are_kept() {
    let model = config("mixtral-8x7b");
    let mut request = Request::train(64, 4096, 256);
    request.fixed = Mapping::parse_fixed("tp=2,ep=8,pp=4,etp=1").unwrap();
    let plans = plan(&model, &h100(), &request).unwrap();
    assert_eq!(plans.len(), 1);
    assert_eq!(plans[0].mapping(), Mapping { tp: 2, cp: 1, pp: 4, ep: 8, etp: 1 });
    for strategy in Strategy::ALL {
        let request = Request { strategy: Some(strategy), ..Request::train(64, 4096, 256) };
        for p in plan(&model, &h100(), &request).unwrap() {
            assert!(strategy.admits(&p.mapping(), p.attention.dp), "{strategy:?} {p:?}");
        }
    }
    let tight = Request { memory_limit_gib: Some(40.0), ..Request::train(64, 4096, 256) };
    assert!(plan(&model, &h100(), &tight).unwrap().iter().all(|p| p.memory_gib.total <= 40.0));
}

#[test]
fn skew_costs_time_and_dropping_bounds_it() {
    let model = config("mixtral-8x7b");
    let run = |routing: Routing, capacity_factor| {
        let mut request = Request { routing, capacity_factor, ..Request::train(64, 4096, 256) };
        request.fixed = Mapping::parse_fixed("tp=1,ep=8,pp=4,etp=1").unwrap();
        plan(&model, &h100(), &request).unwrap()[0].step_ms
    };
    let (flat, skewed, dropped) =
        (run(Routing::Balanced, None), run(Routing::Zipf(1.0), None), run(Routing::Zipf(1.0), Some(1.25)));
    assert!(flat < dropped && dropped < skewed, "{flat} {dropped} {skewed}");
}

#[test]
fn serving_waits_for_the_busiest_rank() {
    let model = config("mixtral-8x7b");
    let run = |routing: Routing, ways: &str| {
        let mut request = Request { routing, global_batch: 256, ..Request::serve(Objective::Decode, 8, 1024, 1024) };
        request.fixed = Mapping::parse_fixed(ways).unwrap();
        plan(&model, &h100(), &request).unwrap()[0].step_ms
    };
    let spread = |ways: &str| {
        let mut loads = vec![1.0; 8];
        loads[3] = 4.0;
        [Routing::Balanced, Routing::Usual, Routing::Zipf(1.0), Routing::Loads(loads)].map(|r| run(r, ways))
    };
    let [even, usual, zipf, loaded] = spread("tp=8,ep=8,etp=1");
    assert!(even < usual && usual < zipf && usual < loaded, "{even} {usual} {zipf} {loaded}");
    let whole = spread("tp=8,ep=1,etp=8");
    // One group of experts has no busiest rank; skewed routing touches fewer experts.
    assert!(whole.iter().all(|step| (0.95 * whole[0]..=whole[0]).contains(step)), "{whole:?}");
}

fn refused(model: &ModelShape, request: &Request) -> PlanError {
    plan(model, &h100(), request).unwrap_err()
}

#[test]
fn impossible_requests_name_what_would_work() {
    let model = config("mixtral-8x7b");
    let base = Request::train(64, 4096, 256);
    let fixed = |text: &str| Request { fixed: Mapping::parse_fixed(text).unwrap(), ..base.clone() };
    for (request, help) in [
        (fixed("ep=16"), "1, 2, 4, 8"),
        (fixed("tp=3"), "1, 2, 4, 8"),
        (fixed("pp=64"), "32"),
        (fixed("tp=64"), "32"),
        (fixed("tp=8,cp=8,pp=8,ep=1,etp=1"), "works"),
        (Request { gpus: 0, ..base.clone() }, "64"),
        (Request { gpus: u64::MAX, ..base.clone() }, "64"),
        (Request { seq: 0, ..base.clone() }, "4096"),
        (Request { seq: u64::MAX, ..base.clone() }, "4096"),
        (Request { global_batch: 0, ..base.clone() }, "1024"),
        (Request { global_batch: u64::MAX, ..base.clone() }, "1024"),
        (Request { order: "tp-xp".into(), ..base.clone() }, "tp-cp-ep-dp-pp"),
    ] {
        let error = refused(&model, &request);
        assert_eq!(error.code, "E0402", "{error:?}");
        assert!(error.help.contains(help), "{error:?} should name {help}");
    }
    let error = refused(&config("deepseek-v3"), &Request::train(8, 4096, 64));
    assert_eq!(error.code, "E0406");
    assert!(error.help.contains("GPUs or more"), "{error:?}");
    assert!(refused(&model, &Request { software: "mcore".into(), ..base.clone() }).help.contains("mcore-0.9"));
    assert!(refused(&model, &Request { memory_limit_gib: Some(-1.0), ..base.clone() }).help.contains("GiB"));
    let mut empty = model.clone();
    empty.hidden = 0;
    assert_eq!(refused(&empty, &base).code, "E0405");
    let text = serde_json::json!({"hidden_size": 64, "num_hidden_layers": 2});
    assert!(ModelShape::from_config_json(&text).unwrap_err().help.contains("num_attention_heads"));
}

#[test]
fn a_pinned_mapping_that_does_not_fit_is_shown_as_infeasible() {
    let mut request = Request::train(64, 4096, 256);
    request.fixed = Mapping::parse_fixed("tp=1,cp=1,pp=1,ep=1,etp=1").unwrap();
    let plans = plan(&config("mixtral-8x7b"), &h100(), &request).unwrap();
    assert!(!plans[0].feasible && plans[0].memory_gib.total > plans[0].memory_gib.limit);
}

#[test]
fn serving_plans_meet_the_latency_bound_or_say_what_is_possible() {
    let model = config("deepseek-v3");
    let h200 = Cluster::preset("dgx-h200").unwrap();
    let mut request = Request {
        precision: Precision::Fp8,
        latency_bound_ms: Some(40.0),
        ..Request::serve(Objective::Decode, 16, 1024, 1024)
    };
    let plans = plan(&model, &h200, &request).unwrap();
    assert!(plans.iter().filter(|p| p.feasible).all(|p| p.tpot_ms.unwrap() <= 40.0));
    assert!(plans[0].feasible && plans[0].tokens_per_s_per_gpu > 0.0);
    for p in &plans {
        assert_eq!(p.attention.tp * p.attention.dp, 16);
        assert_eq!(p.experts.etp * p.experts.ep * p.experts.edp, 16);
    }
    request.latency_bound_ms = Some(0.001);
    let error = plan(&model, &h200, &request).unwrap_err();
    assert!(error.help.contains("ask for"), "{error:?}");
    let prefill = Request { precision: Precision::Fp8, ..Request::serve(Objective::Prefill, 16, 8192, 1024) };
    assert!(plan(&model, &h200, &prefill).unwrap()[0].ttft_ms.unwrap() > 0.0);
    let large = Request { precision: Precision::Bf16, ..Request::serve(Objective::Decode, 1, 1024, 1024) };
    assert_eq!(plan(&model, &h200, &large).unwrap_err().code, "E0406");
}

#[test]
fn the_report_page_is_self_contained() {
    let model = config("mixtral-8x7b");
    let request = Request::train(64, 4096, 256);
    let report = plan_report(&model, &h100(), &request).unwrap();
    let page = html(&report, &model, &h100(), &request).unwrap();
    assert_eq!(page.matches("<svg").count(), if report.plans[0].attention.pp > 1 { 6 } else { 5 });
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for banned in ["http:", "https:", "<script", "<link", "<img", "url("] {
        assert!(!page.contains(banned), "{banned}");
    }
    assert!(page.contains("rank 63") && page.contains("experts up") && page.contains("activations"));
    assert_eq!(page, html(&report, &model, &h100(), &request).unwrap());
}

/// Value of an attribute of an element of the page.
fn attribute(element: &str, name: &str) -> f64 {
    element.split(&format!(" {name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
}

#[test]
fn the_page_draws_the_pipeline_inside_its_frame_without_overlaps() {
    let model = config("mixtral-8x7b");
    let schedules = [Schedule::OneForwardOneBackward, Schedule::ZeroBubble, Schedule::DualPipe];
    for (schedule, fixed) in
        schedules.into_iter().flat_map(|s| [(s, "tp=1,pp=4,ep=8,etp=1,vpp=1"), (s, "tp=1,pp=8,ep=8,etp=1,vpp=4")])
    {
        let mut request = Request::train(64, 4096, 512);
        request.fixed = Mapping::parse_fixed(fixed).unwrap();
        request.schedule = schedule;
        let report = plan_report(&model, &h100(), &request).unwrap();
        let stages = report.plans[0].attention.pp as usize;
        assert_eq!(report.plans[0].stage_seconds.len(), stages);
        let page = html(&report, &model, &h100(), &request).unwrap();
        let drawing = page.split("aria-label=\"pipeline schedule\"").nth(1).unwrap().split("</svg>").next().unwrap();
        let mut rows: BTreeMap<i64, Vec<(f64, f64)>> = BTreeMap::new();
        for block in drawing.split("<rect class=\"block\"").skip(1) {
            let [x, y, width] = ["x", "y", "width"].map(|name| attribute(block, name));
            assert!(x >= 64.0 && x + width <= 900.0 && width > 0.0, "{schedule:?} {fixed}");
            rows.entry(y as i64).or_default().push((x, x + width));
        }
        assert_eq!(rows.len(), stages);
        for row in rows.values_mut() {
            row.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(row.windows(2).all(|w| w[0].1 <= w[1].0 + 0.02), "{schedule:?} {fixed}");
        }
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("a stage idles"));
    }
}

#[test]
fn the_text_fits_a_terminal_and_has_the_columns_of_the_page() {
    let jobs = [
        ("deepseek-v3", "dgx-h100", Request::train(4096, 4096, 61440)),
        ("mixtral-8x7b", "dgx-h100", Request::train(128, 131_072, 256)),
        ("mixtral-8x7b", "dgx-h200", Request::serve(Objective::Decode, 32, 4000, 1000)),
        ("deepseek-v3", "gb200-nvl72", Request::serve(Objective::Prefill, 72, 16_384, 1000)),
    ];
    for (name, cluster, request) in jobs {
        let model = config(name);
        let cluster = Cluster::preset(cluster).unwrap();
        let report = plan_report(&model, &cluster, &request).unwrap();
        let text = moec_plan::text::text(&report);
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
        assert!(text.lines().count() > 15, "{text}");
        let page = html(&report, &model, &cluster, &request).unwrap();
        let head = page.split("<tr>").nth(1).unwrap().split("</tr>").next().unwrap();
        for column in head.split("<th>").skip(2).map(|c| c.split('<').next().unwrap()) {
            assert!(text.contains(column), "{column} in {text}");
        }
    }
}

#[test]
fn among_instances_the_model_cannot_tell_apart_the_one_of_fewest_gpus_is_taken() {
    let h200 = Cluster::preset("dgx-h200").unwrap();
    let mut settled = 0;
    for (name, gpus, bound) in [
        ("deepseek-v3", 32, 80.0),
        ("deepseek-v3", 8, 20.0),
        ("qwen3-30b-a3b", 16, 15.0),
        ("qwen3-30b-a3b", 8, 20.0),
        ("gpt-oss-120b", 16, 15.0),
        ("glm-4.5-air", 16, 30.0),
        ("minimax-m2", 16, 20.0),
        ("gpt-oss-120b", 8, 40.0),
        ("minimax-m2", 32, 80.0),
        ("mixtral-8x7b", 8, 20.0),
    ] {
        let request = Request {
            precision: Precision::Fp8,
            latency_bound_ms: Some(bound),
            software: "trtllm".into(),
            top: 1000,
            ..Request::serve(Objective::Decode, gpus, 4000, 1000)
        };
        let report = plan_report(&config(name), &h200, &request).unwrap();
        let feasible: Vec<_> = report.plans.iter().filter(|p| p.feasible).collect();
        let best = feasible.iter().map(|p| p.tokens_per_s_per_gpu).fold(0.0, f64::max);
        let size = |p: &moec_plan::Plan| p.gpus / p.experts.edp;
        let first = feasible[0];
        assert!(first.tokens_per_s_per_gpu >= 0.93 * best, "{name}");
        let tied = feasible.iter().filter(|p| p.tokens_per_s_per_gpu >= 0.93 * best);
        assert!(tied.clone().all(|p| size(p) >= size(first)), "{name}");
        assert_eq!(report.tie.is_some(), first.tokens_per_s_per_gpu < best, "{name}");
        if let Some(tie) = &report.tie {
            assert!(moec_plan::text::text(&report).contains("7%") && tie.contains("instead of"), "{tie}");
            settled += 1;
        }
        assert!(feasible.iter().skip(1).all(|p| p.why.is_some()), "{name}");
    }
    assert!(settled >= 3, "{settled}");
}

#[test]
fn serving_says_what_changing_one_size_does() {
    let h200 = Cluster::preset("dgx-h200").unwrap();
    for objective in [Objective::Prefill, Objective::Decode] {
        let request = Request { precision: Precision::Fp8, top: 1000, ..Request::serve(objective, 16, 4000, 1000) };
        let report = plan_report(&config("deepseek-v3"), &h200, &request).unwrap();
        assert!(report.sensitivity.len() >= 2, "{:?}", report.sensitivity);
        let best = &report.plans[0];
        for change in &report.sensitivity {
            assert!(change.text.contains(&change.change) && change.text.contains("GiB"), "{}", change.text);
            let Some(ep) = change.change.strip_prefix("ep=") else { continue };
            let other = report.plans.iter().find(|p| {
                (p.attention, p.experts.edp) == (best.attention, best.experts.edp) && p.experts.ep.to_string() == ep
            });
            let memory = other.unwrap().memory_gib.total - best.memory_gib.total;
            assert!((memory - change.memory_gib).abs() < 1e-9, "{}", change.text);
        }
    }
}
