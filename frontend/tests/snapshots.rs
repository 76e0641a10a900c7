//! The text of small blocks: what families compose, at a glance.

use moec_frontend::read_config;

/// Blocks of a small model, without their weights.
fn text(keys: &str) -> String {
    let base = r#""torch_dtype": "bfloat16", "hidden_size": 8, "num_hidden_layers": 1, "num_experts_per_tok": 2"#;
    let config = format!("{{{base}, {keys}}}");
    let model = read_config(&config, "small/config.json").unwrap_or_else(|e| panic!("{e:#?}"));
    let text = moec_ir::print(&model.forms[0].graph);
    text.lines()
        .filter(|line| line.contains(" = ") && line.trim_start().starts_with('%'))
        .map(|l| format!("{}\n", l.trim()))
        .collect()
}

macro_rules! snapshots {
    ($($name:ident: $keys:literal,)*) => {
        $(#[test] fn $name() { insta::assert_snapshot!(stringify!($name), text($keys)); })*
    };
}

snapshots! {
    mixtral: r#""model_type": "mixtral", "intermediate_size": 4, "num_local_experts": 4"#,
    qwen2_moe: r#""model_type": "qwen2_moe", "moe_intermediate_size": 4, "num_experts": 4, "shared_expert_intermediate_size": 6"#,
    deepseek_v2: r#""model_type": "deepseek_v2", "moe_intermediate_size": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0"#,
    deepseek_v3: r#""model_type": "deepseek_v3", "first_k_dense_replace": 0, "moe_intermediate_size": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.5"#,
    gpt_oss: r#""model_type": "gpt_oss", "intermediate_size": 4, "num_local_experts": 4"#,
    llama4: r#""model_type": "llama4_text", "intermediate_size": 4, "num_local_experts": 4"#,
    granite: r#""model_type": "granitemoe", "intermediate_size": 4, "num_local_experts": 4"#,
    gemma4: r#""model_type": "gemma4_text", "enable_moe_block": true, "moe_intermediate_size": 4, "num_experts": 4"#,
    inkling: r#""model_type": "inkling_text", "moe_intermediate_size": 4, "n_routed_experts": 4, "n_shared_experts": 1"#,
    lfm2: r#""model_type": "lfm2_moe", "num_dense_layers": 0, "moe_intermediate_size": 4, "num_experts": 4"#,
}
