//! Bad input: each refusal has its code, says what is wrong and names what would work.

use moec_place::{Code, Input, Loads, Method, Options, PlaceError, Trace, host, metrics, place};

fn loads() -> Input {
    Input::from(Loads::new(vec![vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]).unwrap())
}

fn gpus(n: usize) -> Options {
    Options { gpus: Some(n), ..Options::default() }
}

/// The refusal has this code, and its message and help hold these words.
fn refused<T: std::fmt::Debug>(result: Result<T, PlaceError>, code: Code, message: &str, help: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(message), "{} lacks {message}", error.message);
    assert!(error.help.contains(help), "{} lacks {help}", error.help);
}

#[test]
fn loads_files_that_are_no_loads() {
    refused(Input::from_json("  "), Code::Empty, "empty", "[[");
    refused(Input::from_json("[[1, 2,]]"), Code::NotJson, "line 1", "trailing commas");
    refused(Input::from_json("[[1, 2"), Code::NotJson, "EOF", "complete");
    refused(Input::from_json("[[1, NaN]]"), Code::NotJson, "line 1", "NaN");
    refused(Input::from_json("17"), Code::UnknownForm, "17", "[[");
    refused(Input::from_json("[1, 2]"), Code::UnknownForm, "one list", "[[..]]");
    refused(Input::from_json("[[1, \"2\"]]"), Code::UnknownForm, "expert 1", "");
    refused(Input::from_json("[]"), Code::Empty, "no layer", "");
    refused(Input::from_json("[[]]"), Code::Empty, "no expert", "");
    refused(Input::from_json("[[1, 2], [3]]"), Code::Ragged, "layer 1 has 1", "");
    refused(Input::from_json("[[1, -2]]"), Code::BadLoad, "expert 1: the load is -2", "between 0");
    refused(Input::from_json("[[1, 1e300]]"), Code::BadLoad, "expert 1", "2^53");
    refused(Input::from_json("{\"num_gpus\": 8}"), Code::UnknownForm, "no loads", "weight");
    refused(Input::from_json("{\"weights\": [[1]]}"), Code::UnknownForm, "weights", "known keys");
    refused(Input::from_json("{\"weight\": [[1]], \"num_gpus\": -8}"), Code::UnknownForm, "num_gpus", "");
    let nested = "[".repeat(100_000);
    refused(Input::from_json(&nested), Code::NotJson, "recursion limit", "");
    assert!(Loads::new(vec![vec![f64::NAN]]).is_err());
}

#[test]
fn counts_that_are_zero_missing_or_do_not_divide() {
    refused(place(&loads(), &Options::default()), Code::BadCount, "GPUs is not given", "--gpus");
    refused(place(&loads(), &gpus(0)), Code::BadCount, "gpus is 0", "at least 1");
    refused(place(&loads(), &Options { nodes: Some(0), ..gpus(4) }), Code::BadCount, "nodes", "at least 1");
    refused(
        place(&loads(), &Options { replicas: Some(10), ..gpus(4) }),
        Code::NotDivisible,
        "10 expert slots (replicas) do not divide over 4",
        "8 or 12",
    );
    refused(place(&loads(), &Options { replicas: Some(4), ..gpus(4) }), Code::TooFewSlots, "8 experts", "8 or 12");
    let grouped = Options { nodes: Some(2), groups: Some(2), ..gpus(1) };
    refused(place(&loads(), &grouped), Code::NotDivisible, "1 GPUs do not divide over 2 nodes", "1");
    let grouped = Options { nodes: Some(1), groups: Some(3), ..gpus(4) };
    refused(place(&loads(), &grouped), Code::NotDivisible, "into 3 groups", "1, 2, 4, 8");
    let spill = Options { method: Some(Method::LeastLoaded), ..gpus(3) };
    refused(place(&loads(), &spill), Code::NotDivisible, "3 GPUs", "1, 2, 4, 8");
    let ranks = Options { method: Some(Method::OnePerRank), ..gpus(4) };
    refused(place(&loads(), &ranks), Code::TooFewSlots, "4 ranks", "at least 8");
    refused(place(&loads(), &Options { replicas: Some(1 << 40), ..gpus(1) }), Code::TooLarge, "slots", "65536");
}

#[test]
fn methods_that_need_something_else() {
    let affinity = Options { method: Some(Method::Affinity), ..gpus(4) };
    refused(place(&loads(), &affinity), Code::WrongInput, "needs a trace", "eplb");
    refused(Method::from_name("elpb"), Code::BadOption, "elpb", "eplb, balance, ilp");
    let half = Input::from(Loads::new(vec![vec![1.5, 2.0]]).unwrap());
    let spill = Options { method: Some(Method::LeastLoaded), ..gpus(2) };
    refused(place(&half, &spill), Code::BadLoad, "1.5", "counts");
    let alpha = Options { alpha: Some(f64::NAN), ..spill };
    refused(place(&loads(), &alpha), Code::BadOption, "alpha is NaN", "default is 1.1");
    let large = Input::from(Loads::new(vec![(0..200).map(|e| f64::from(e * e % 97)).collect()]).unwrap());
    let exact = Options { method: Some(Method::Ilp), replicas: Some(320), ..gpus(64) };
    refused(place(&large, &exact), Code::TooLarge, "integer variables", "balance");
}

#[test]
fn traces_that_are_no_traces() {
    refused(Trace::from_jsonl("", None), Code::Empty, "no token", "");
    refused(Trace::from_jsonl("[[1], [2]]\n[[1]]", None), Code::Ragged, "token 1", "every layer");
    refused(Trace::from_jsonl("[[1], [2]]\nx", None), Code::NotJson, "line 2", "");
    refused(Trace::from_jsonl("[[1.5]]", None), Code::BadTrace, "line 1", "");
    refused(Trace::from_jsonl("{\"layer\": 0}", None), Code::BadTrace, "experts", "");
    refused(Trace::from_jsonl("[[-2]]\n[[3]]", None), Code::BadTrace, "expert id -2", "-1");
    refused(Trace::from_jsonl("[[9]]", Some(8)), Code::BadTrace, "expert id 9", "7");
    let far = "{\"token\": 99999999999, \"layer\": 0, \"experts\": [1]}";
    refused(Trace::from_jsonl(far, None), Code::BadTrace, "far beyond", "");
    let twice = "{\"token\": 0, \"layer\": 0, \"experts\": [1]}\n{\"token\": 0, \"layer\": 0, \"experts\": [1]}";
    refused(Trace::from_jsonl(twice, None), Code::BadTrace, "twice", "");
    refused(Trace::from_ids(&[1, 2, 3], 2, 1, 2, None), Code::BadTrace, "3 ids", "row-major");
    refused(Trace::from_ids(&[-1], 1, 1, 1, None), Code::Empty, "no token", "");
    let trace = Input::from(Trace::from_ids(&[0, 1, 2], 3, 1, 1, None).unwrap());
    refused(place(&trace, &gpus(2)), Code::NotDivisible, "3 experts", "1, 3");
    assert!(place(&trace, &Options { experts: Some(4), ..gpus(2) }).is_ok());
    refused(place(&trace, &Options { replicas: Some(6), ..gpus(3) }), Code::BadOption, "once", "eplb");
}

#[test]
fn host_functions_check_shapes() {
    refused(metrics::srp(&[0, 1, 2], 2, 4, 1), Code::Ragged, "3 ids", "");
    refused(metrics::srp(&[0, 1], 1, 4, 3), Code::BadOption, "window of 3", "between 1 and 2");
    refused(metrics::sch(&[0, 9], 1, 4, 1, 1), Code::BadTrace, "9 of 4", "");
    refused(metrics::affinity((&[0], 1), (&[0, 1], 1), 2), Code::Ragged, "1 tokens", "");
    refused(host::self_contrast(&[1.0], &[1.0, 2.0], 1, 0.1, 0.5), Code::Ragged, "weak", "");
    refused(host::self_contrast(&[1.0], &[1.0], 1, 0.0, 0.5), Code::BadOption, "alpha", "");
    refused(host::load_balance_loss(&[0.5, 0.5], 2, &[0], 1, &[]), Code::BadOption, "micro", "");
    refused(host::lsh_moe(&[1.0, 2.0], 2, &[&[1.0]], |x| x.to_vec()), Code::Ragged, "rotation", "4");
    assert!(host::glu(0, &[], &[], &[]).is_err());
}

#[test]
fn refusals_serialise_with_code_message_and_help() {
    let error = place(&loads(), &gpus(0)).unwrap_err();
    let json = serde_json::to_value(&error).unwrap();
    assert_eq!(json["code"], "E0416");
    assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["code", "message", "help"]);
    assert_eq!(error.to_string(), "E0416: gpus is 0");
    assert!(Code::ALL.windows(2).all(|w| w[0].as_str() < w[1].as_str()));
}

#[test]
fn loads_of_zero_are_even() {
    let input = Input::from(Loads::new(vec![vec![0.0; 8]]).unwrap());
    for method in [Method::Eplb, Method::Balance, Method::Ilp, Method::LeastLoaded, Method::LeastLoadedPaper] {
        let found = place(&input, &Options { method: Some(method), ..gpus(4) }).unwrap();
        let json = serde_json::to_value(&found).unwrap();
        let ratio = &json["max_over_mean"];
        assert!(*ratio == 1.0 || ratio[0] == 1.0, "{method:?}: {ratio}");
    }
}
