//! Rank groups against the published vectors, and their laws on many sizes.

use moec_plan::{Mapping, groups, mapping::divisors};
use serde_json::Value;
use std::collections::BTreeSet;

fn vectors() -> Vec<Value> {
    let file: Value = serde_json::from_str(include_str!("data/rank-groups.json")).unwrap();
    file["vectors"].as_array().unwrap().clone()
}

#[test]
fn every_published_vector_comes_out_exactly() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 25);
    for v in &vectors {
        let int = |key: &str| v["input"][key].as_u64().unwrap();
        let mapping = Mapping { tp: int("tp"), cp: int("cp"), pp: int("pp"), ep: int("ep"), etp: int("etp") };
        let result = groups(int("world"), &mapping, v["input"]["order"].as_str().unwrap());
        match (&result, v["expected"]["error"].as_str()) {
            (Ok(groups), None) => assert_eq!(serde_json::to_value(groups).unwrap(), v["expected"], "{}", v["id"]),
            (Err(error), Some(reason)) => {
                assert_eq!((error.code, error.message.as_str()), ("E0402", reason), "{}", v["id"]);
                assert!(!error.help.is_empty());
            }
            (result, expected) => panic!("{}: {result:?}, expected {expected:?}", v["id"]),
        }
    }
}

/// A fixed pseudo-random sequence, so that a failure repeats.
struct Sequence(u64);

impl Sequence {
    fn pick(&mut self, from: &[u64]) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        from[(self.0 >> 33) as usize % from.len()]
    }
}

#[test]
fn each_rank_is_in_exactly_one_group_per_dimension() {
    let mut random = Sequence(7);
    let mut accepted = 0;
    for _ in 0..3000 {
        let world = random.pick(&[1, 2, 6, 8, 12, 24, 30, 32, 48, 60, 64, 96, 128, 210]);
        let all = divisors(world);
        let mapping = Mapping {
            tp: random.pick(&all),
            cp: random.pick(&all),
            pp: random.pick(&all),
            ep: random.pick(&all),
            etp: random.pick(&all),
        };
        let orders = [
            "tp-cp-ep-dp-pp",
            "tp-ep-cp-dp-pp",
            "ep-tp-cp-dp-pp",
            "cp-tp-ep-dp-pp",
            "tp-cp-ep-pp-dp",
            "dp-tp-cp-ep-pp",
        ];
        let order = orders[random.pick(&[0, 1, 2, 3, 4, 5]) as usize];
        let Ok(found) = groups(world, &mapping, order) else { continue };
        accepted += 1;
        let (a, e) = (&found.attention, &found.moe);
        let sized = [
            (&a.tp, mapping.tp),
            (&a.cp, mapping.cp),
            (&a.dp, found.dp),
            (&a.pp, mapping.pp),
            (&a.dp_cp, found.dp * mapping.cp),
            (&a.tp_cp, mapping.tp * mapping.cp),
            (&a.tp_pp, mapping.tp * mapping.pp),
            (&e.etp, mapping.etp),
            (&e.ep, mapping.ep),
            (&e.edp, found.edp),
            (&e.pp, mapping.pp),
            (&e.etp_ep, mapping.etp * mapping.ep),
            (&e.etp_ep_pp, mapping.etp * mapping.ep * mapping.pp),
        ];
        for (list, size) in sized {
            let ranks: Vec<u32> = list.iter().flatten().copied().collect();
            assert_eq!(ranks.len() as u64, world, "{world} {mapping:?} {order}");
            assert_eq!(ranks.iter().collect::<BTreeSet<_>>().len() as u64, world, "{world} {mapping:?} {order}");
            assert!(list.iter().all(|group| group.len() as u64 == size), "{world} {mapping:?} {order}");
        }
        assert_eq!(a.pp, e.pp, "pipeline groups agree: {world} {mapping:?} {order}");
    }
    assert!(accepted > 300, "{accepted}");
}

#[test]
fn orders_and_sizes_that_cannot_be_are_refused_with_a_way_out() {
    let ok = Mapping::ONE;
    for order in ["", "tp-tp-dp", "tp-cp-xp-dp-pp", "tp-cp-ep-pp"] {
        let error = groups(8, &ok, order).unwrap_err();
        assert_eq!(error.code, "E0402");
        assert!(error.help.contains("tp-cp-ep-dp-pp"), "{order}: {error:?}");
    }
    for mapping in [
        Mapping { tp: 3, ..ok },
        Mapping { ep: 0, ..ok },
        Mapping { pp: u64::MAX, ..ok },
        Mapping { tp: 1 << 40, ..ok },
    ] {
        let error = groups(8, &mapping, "tp-cp-ep-dp-pp").unwrap_err();
        assert!(error.help.contains('8'), "{error:?}");
    }
    assert!(groups(0, &ok, "tp-cp-ep-dp-pp").is_err());
    assert!(groups(1 << 60, &ok, "tp-cp-ep-dp-pp").unwrap_err().message.contains("outside"));
}
