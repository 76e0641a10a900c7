//! The model families: one reader and one composition each.

mod afmoe;
mod aria;
mod cohere;
mod dbrx;
mod deepseek;
mod deepseek_v4;
mod doge;
mod ernie;
mod gemma;
mod gpt_oss;
mod granite;
mod hunyuan;
mod hy_v3;
mod inkling;
mod jamba;
mod laguna;
mod layers;
mod lfm2;
mod llama4;
mod longcat;
mod minimax_m2;
mod mixtral;
mod nemotron;
mod nllb;
mod pangu;
mod phimoe;
mod qwen;
mod sigmoid;
mod smallthinker;
mod step;
mod switch;
mod zaya;

use crate::{
    block::MoeLayer,
    check,
    keys::{Keys, Num, Refused},
    limits,
};
use moec_ir::ops::UnaryFn;

/// What a family makes of a config.
pub(crate) struct Draft {
    /// Width of the residual stream.
    pub(crate) hidden: u64,
    /// The mixture block of every layer; none in dense layers.
    pub(crate) layers: Vec<Option<MoeLayer>>,
}

/// A family: the model types that one reader understands.
pub(crate) struct Family {
    /// Model types, as configs spell them.
    pub(crate) types: &'static [&'static str],
    /// Class names of `architectures`, without the task suffix.
    pub(crate) classes: &'static [&'static str],
    /// The reader.
    pub(crate) read: fn(&mut Keys<'_>) -> Result<Draft, Refused>,
}

const fn family(
    types: &'static [&'static str],
    classes: &'static [&'static str],
    read: fn(&mut Keys<'_>) -> Result<Draft, Refused>,
) -> Family {
    Family { types, classes, read }
}

/// All families.
pub(crate) static FAMILIES: &[Family] = &[
    family(&["mixtral"], &["Mixtral"], mixtral::read),
    family(&["minimax"], &["MiniMax"], mixtral::read),
    family(&["olmoe"], &["Olmoe"], qwen::read_olmoe),
    family(&["flex_olmo"], &["FlexOlmo"], qwen::read_olmoe),
    family(&["qwen2_moe"], &["Qwen2Moe"], qwen::read),
    family(&["qwen3_moe"], &["Qwen3Moe"], qwen::read),
    family(&["qwen3_next"], &["Qwen3Next"], qwen::read),
    family(&["qwen3_5_moe", "qwen3_5_moe_text"], &["Qwen3_5Moe"], qwen::read),
    family(&["qwen3_vl_moe", "qwen3_vl_moe_text"], &["Qwen3VLMoe"], qwen::read),
    family(&["qwen3_omni_moe"], &["Qwen3OmniMoe"], qwen::read),
    family(&["qwen4_exp", "qwen4_exp_text"], &["Qwen4Exp"], qwen::read),
    family(&["mellum"], &["Mellum"], qwen::read),
    family(&["sigma_moe"], &["SigmaMoE"], qwen::read),
    family(&["deepseek"], &["Deepseek"], deepseek::read_v1),
    family(&["deepseek_v2"], &["DeepseekV2"], deepseek::read_v2),
    family(&["deepseek_ocr2", "deepseek_ocr2_text"], &["DeepseekOcr2"], deepseek::read_v2),
    family(&["deepseek_v3"], &["DeepseekV3"], deepseek::read_v3),
    family(&["deepseek_v32"], &["DeepseekV32"], deepseek::read_v3),
    family(&["kimi_k2"], &["KimiK2", "DeepseekV3"], deepseek::read_v3),
    family(&["kimi_k25"], &["KimiK25", "DeepseekV3"], deepseek::read_v3),
    family(&["glm4_moe"], &["Glm4Moe"], deepseek::read_v3),
    family(&["glm4_moe_lite"], &["Glm4MoeLite"], deepseek::read_v3),
    family(&["glm4v_moe", "glm4v_moe_text"], &["Glm4vMoe"], deepseek::read_v3),
    family(&["glm_moe_dsa"], &["GlmMoeDsa"], deepseek::read_v3),
    family(&["glm5_next", "glm5_next_text"], &["Glm5Next"], deepseek::read_v3),
    family(&["hy_v4"], &["HYV4"], deepseek::read_v3),
    family(&["solar_open"], &["SolarOpen"], deepseek::read_v3),
    family(&["dots1"], &["Dots1"], deepseek::read_v3),
    family(&["mimo_v2_flash"], &["MiMoV2Flash"], deepseek::read_v3),
    family(&["exaone_moe"], &["ExaoneMoe"], deepseek::read_v3),
    family(&["axk1"], &["AXK1"], deepseek::read_v3),
    family(&["axk2"], &["AXK2"], deepseek::read_v3),
    family(&["kimi_linear"], &["KimiLinear"], deepseek::read_v3),
    family(&["mistral4"], &["Mistral4"], deepseek::read_mistral4),
    family(&["deepseek_v4"], &["DeepseekV4"], deepseek_v4::read),
    family(&["jamba"], &["Jamba"], jamba::read),
    family(&["hunyuan_v1_moe"], &["HunYuanMoEV1"], hunyuan::read),
    family(&["dbrx"], &["Dbrx"], dbrx::read),
    family(&["gpt_oss"], &["GptOss"], gpt_oss::read),
    family(&["openai_privacy_filter"], &["OpenAIPrivacyFilter"], gpt_oss::read),
    family(&["granitemoe"], &["GraniteMoe"], granite::read),
    family(&["granitemoeshared"], &["GraniteMoeShared"], granite::read),
    family(&["granitemoehybrid"], &["GraniteMoeHybrid"], granite::read),
    family(&["granitemoe_swa"], &["GraniteMoeSwa"], granite::read),
    family(&["jetmoe"], &["JetMoe"], granite::read),
    family(&["aria", "aria_text"], &["Aria", "AriaText"], aria::read),
    family(&["cohere2_moe"], &["Cohere2Moe"], cohere::read),
    family(&["smallthinker"], &["SmallThinker"], smallthinker::read),
    family(&["minimax_m2"], &["MiniMaxM2"], minimax_m2::read),
    family(
        &["minimax_m3_vl", "minimax_m3_vl_text"],
        &["MiniMaxM3VL", "MiniMaxM3SparseForConditionalGeneration"],
        minimax_m2::read,
    ),
    family(&["step3p7", "step3p5"], &["Step3p7", "Step3p5"], step::read),
    family(&["hy_v3"], &["HYV3"], hy_v3::read),
    family(&["afmoe"], &["Afmoe"], afmoe::read),
    family(&["laguna"], &["Laguna"], laguna::read),
    family(&["lfm2_moe"], &["Lfm2Moe"], lfm2::read),
    family(&["inkling_mm_model", "inkling_text"], &["Inkling"], inkling::read),
    family(&["ernie4_5_moe"], &["Ernie4_5_Moe"], ernie::read),
    family(&["ernie4_5_vl_moe", "ernie4_5_vl_moe_text"], &["Ernie4_5_VLMoe"], ernie::read),
    family(&["longcat_flash"], &["LongcatFlash"], longcat::read),
    family(&["PanguProMoE", "pangu_pro_moe"], &["PanguProMoE"], pangu::read),
    family(&["llama4", "llama4_text"], &["Llama4"], llama4::read),
    family(&["phimoe"], &["Phimoe", "PhiMoE"], phimoe::read),
    family(&["gemma4_text"], &["Gemma4"], gemma::read),
    family(&["gemma4"], &["Gemma4"], gemma::read),
    family(&["diffusion_gemma"], &["DiffusionGemma"], gemma::read),
    family(&["zaya"], &["Zaya"], zaya::read),
    family(&["doge"], &["Doge"], doge::read),
    family(&["switch_transformers"], &["SwitchTransformers"], switch::read),
    family(&["nllb-moe", "nllb_moe"], &["NllbMoe"], nllb::read),
    family(&["nemotron_h"], &["NemotronH"], nemotron::read),
];

/// The sizes that almost every family has, checked against each other.
pub(crate) struct Sizes {
    /// Width of the residual stream.
    pub(crate) hidden: Num,
    /// Layers.
    pub(crate) layers: Num,
    /// Routed experts.
    pub(crate) experts: Num,
    /// Experts of a token.
    pub(crate) top_k: Num,
}

/// The usual names of the number of routed experts.
pub(crate) const EXPERTS: &[&str] = &["num_experts", "num_local_experts", "n_routed_experts"];
/// The usual names of the number of experts of a token.
pub(crate) const TOP_K: &[&str] = &["num_experts_per_tok", "num_experts_per_token", "experts_per_token"];

/// Reads the width and the number of layers.
pub(crate) fn trunk(keys: &mut Keys<'_>) -> (Num, Num) {
    let hidden = keys.size(&["hidden_size", "d_model"], 1, limits::SIZE);
    let layers = layer_count(keys, &["num_hidden_layers", "n_layers"]);
    (hidden, layers)
}

/// Reads a number of layers.
pub(crate) fn layer_count(keys: &mut Keys<'_>, names: &[&str]) -> Num {
    let mut layers = keys.size(names, 1, limits::SIZE);
    check::limit(keys, &layers, limits::LAYERS, "layers");
    layers.value = layers.value.min(limits::LAYERS);
    layers
}

/// Reads hidden size, layers, experts and experts per token under their usual names.
pub(crate) fn sizes(keys: &mut Keys<'_>, experts: &[&str], top_k: &[&str]) -> Sizes {
    let (hidden, layers) = trunk(keys);
    let experts = keys.size(experts, 1, limits::SIZE);
    let top_k = keys.size(top_k, 1, limits::SIZE);
    check_experts(keys, &experts, &top_k);
    Sizes { hidden, layers, experts, top_k }
}

/// The rules for experts and experts per token.
pub(crate) fn check_experts(keys: &mut Keys<'_>, experts: &Num, top_k: &Num) {
    check::limit(keys, experts, limits::EXPERTS, "experts");
    check::top_k(keys, top_k, experts);
    check::one_expert(keys, top_k, experts);
}

/// Reads the width of an expert and checks the volume of a layer.
pub(crate) fn inner(keys: &mut Keys<'_>, names: &[&str], sizes: &Sizes) -> Num {
    let inner = keys.size(names, 1, limits::SIZE);
    check::volume(keys, &sizes.experts, &inner, &sizes.hidden);
    inner
}

/// Reads the activation of the experts.
pub(crate) fn act(keys: &mut Keys<'_>, names: &[&str]) -> UnaryFn {
    act_or(keys, names, UnaryFn::Silu)
}

/// Reads the activation of the experts, with the default of the family.
pub(crate) fn act_or(keys: &mut Keys<'_>, names: &[&str], default: UnaryFn) -> UnaryFn {
    keys.choice(
        names,
        default,
        &[
            ("silu", UnaryFn::Silu),
            ("swish", UnaryFn::Silu),
            ("gelu", UnaryFn::Gelu),
            ("gelu_pytorch_tanh", UnaryFn::GeluTanh),
            ("gelu_new", UnaryFn::GeluTanh),
            ("relu", UnaryFn::Relu),
            ("relu2", UnaryFn::Relu2),
        ],
    )
}

/// Builds the block of every mixture layer; `prefix` holds `{i}` for the layer.
pub(crate) fn build(hidden: u64, sparse: &[bool], prefix: &str, block: impl Fn(u64, String) -> MoeLayer) -> Draft {
    let layers = sparse
        .iter()
        .zip(0u64..)
        .map(|(sparse, i)| sparse.then(|| block(i, prefix.replace("{i}", &i.to_string()))))
        .collect();
    Draft { hidden, layers }
}
