//! Cases without a graph: what a host computes beside the kernels.

use super::{
    CaseResult, refused,
    system::{Judgement, Tolerance},
};
use crate::Error;
use moec_check::compare;
use moec_place::{PlaceError, host, metrics};
use moec_runtime::SafetensorsBytes;

/// Tensors of the case as numbers.
struct Data<'a>(&'a SafetensorsBytes<'a>);

impl Data<'_> {
    fn numbers(&self, name: &str) -> Result<Vec<f64>, Error> {
        Ok(compare::tensor(self.0, name)?.0)
    }

    fn shape(&self, name: &str) -> Result<Vec<u64>, Error> {
        Ok(compare::tensor(self.0, name)?.1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "ids were integers")]
    fn ids(&self, name: &str) -> Result<Vec<i64>, Error> {
        Ok(self.numbers(name)?.into_iter().map(|v| v as i64).collect())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that `map_err` takes")]
fn misfit(error: PlaceError) -> Error {
    refused(error.to_string())
}

/// Computes and compares a case by the name of its computation.
pub(super) fn run(
    name: &str,
    case: &str,
    tensors: &SafetensorsBytes<'_>,
    tolerance: Tolerance,
) -> Result<CaseResult, Error> {
    let data = Data(tensors);
    let mut judgement = Judgement::new(tolerance);
    let output = match case {
        "analysis_srp_sch" => {
            let ids = data.ids("inputs.topk_indices_in")?;
            vec![
                metrics::srp(&ids, 2, 8, 8).map_err(misfit)?,
                metrics::sch(&ids, 2, 8, 8, 2).map_err(misfit)?,
                metrics::sch(&ids, 2, 8, 8, 4).map_err(misfit)?,
            ]
        }
        "analysis_affinity" => {
            let [first, second] = ["inputs.topk_indices_0_in", "inputs.topk_indices_1_in"];
            let experts = data.shape("expected.output")?.first().copied().unwrap_or(0);
            let experts = usize::try_from(experts).unwrap_or(0);
            metrics::affinity((&data.ids(first)?, 2), (&data.ids(second)?, 2), experts).map_err(misfit)?
        }
        "load_balance_loss" => {
            let probs = host::softmax(&data.numbers("inputs.router_logits")?, 8);
            let ids = host::top_k(&probs, 8, 2);
            #[expect(clippy::cast_precision_loss, reason = "ids are small")]
            let found: Vec<f64> = ids.iter().map(|id| *id as f64).collect();
            judgement.equal("topk_indices", &found, &data.numbers("expected.topk_indices")?, 2);
            let loss = host::load_balance_loss(&probs, 8, &ids, 2, &host::micro_batches(24, 3)).map_err(misfit)?;
            vec![loss.micro, loss.global]
        }
        "scmoe_contrast" => {
            let (strong, weak) = (data.numbers("inputs.logits_strong")?, data.numbers("inputs.logits_weak")?);
            let found = host::self_contrast(&strong, &weak, 32, 0.1, 0.5).map_err(misfit)?;
            let kept: Vec<f64> = found.kept.iter().map(|k| f64::from(u8::from(*k))).collect();
            judgement.equal("mask", &kept, &data.numbers("expected.mask")?, 32);
            #[expect(clippy::cast_precision_loss, reason = "token ids are far below 2^53")]
            let next: Vec<f64> = found.next_token.iter().map(|t| *t as f64).collect();
            judgement.equal("next_token", &next, &data.numbers("expected.next_token")?, 1);
            found.scores.iter().map(|z| if z.is_finite() { *z } else { 0.0 }).collect()
        }
        "lsh_moe" => {
            let rotations = [data.numbers("weights.rotation.0")?, data.numbers("weights.rotation.1")?];
            let [gate, up, down] = ["gate", "up", "down"].map(|n| data.numbers(&format!("weights.experts.0.{n}")));
            let (gate, up, down) = (gate?, up?, down?);
            let expert = host::glu(16, &gate, &up, &down).map_err(misfit)?;
            let x = data.numbers("inputs.x")?;
            let found = host::lsh_moe(&x, 16, &[&rotations[0], &rotations[1]], &expert).map_err(misfit)?;
            #[expect(clippy::cast_precision_loss, reason = "buckets are few")]
            let buckets: Vec<f64> = found.buckets.iter().map(|b| *b as f64).collect();
            judgement.equal("buckets", &buckets, &data.numbers("expected.buckets")?, 1);
            judgement.close("centroids", &found.centroids, &data.numbers("expected.centroids")?);
            found.output
        }
        other => {
            let what = match other.strip_prefix("pass_") {
                Some(pass) => format!("there is no pass `{pass}` that rewrites weights and graph"),
                None => format!("there is no computation `{other}`"),
            };
            return Ok(CaseResult::failed(name, what));
        }
    };
    judgement.close("output", &output, &data.numbers("expected.output_ref")?);
    Ok(judgement.result(name))
}
