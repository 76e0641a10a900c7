//! Tests of the JSON reader: every rule of bad text, and spans.

use super::*;

fn code(text: &str) -> &'static str {
    match parse_object(text) {
        Ok(_) => "ok",
        Err(error) => error.code.0,
    }
}

#[test]
fn empty_text_is_e0101() {
    assert_eq!(code(""), "E0101");
    assert_eq!(code(" \n\t "), "E0101");
    assert_eq!(decode(b"").unwrap_err().code.0, "E0101");
}

#[test]
fn byte_order_mark_is_accepted() {
    assert_eq!(code("\u{feff}{}"), "ok");
    assert!(decode(b"\xef\xbb\xbf{}").is_ok());
}

#[test]
fn other_encodings_are_e0102() {
    assert_eq!(decode(b"\xff\xfe{\0}\0").unwrap_err().code.0, "E0102");
    assert_eq!(decode(b"{\0}\0").unwrap_err().code.0, "E0102");
    let latin = decode(b"{\"a\": \"caf\xe9\"}").unwrap_err();
    assert_eq!(latin.code.0, "E0102");
    assert!(latin.message.contains("byte 10"), "{}", latin.message);
    assert_eq!(code(r#"{"a": "\ud800"}"#), "E0102");
}

#[test]
fn cut_off_text_is_e0103_with_the_opening() {
    for text in ["{\"a\": \"b", "{\"a\": 12", "{\"a\": {\"b\": 1", "[1, 2", "{\"a\"", "{\"a\": tr", "{\"a\":"] {
        let error = parse(text).unwrap_err();
        assert_eq!(error.code.0, "E0103", "{text}");
        if text != "{\"a\": tr" {
            assert!(error.labels.iter().any(|l| !l.primary), "{text}: {error:?}");
        }
    }
}

#[test]
fn constructs_of_other_formats_are_named() {
    let help = |text: &str| {
        let error = parse(text).unwrap_err();
        assert_eq!(error.code.0, "E0103", "{text}");
        format!("{} {}", error.message, error.help.unwrap_or_default())
    };
    assert!(help("{\"a\": 1,}").contains("comma"));
    assert!(help("{\"a\": 1 // x\n}").contains("comment"));
    assert!(help("{\"a\": 1 /* x */}").contains("comment"));
    assert!(help("{'a': 1}").contains("double quotes"));
    assert!(help("{\"a\": 'b'}").contains("double quotes"));
    assert!(help("{a: 1}").contains("double quotes"));
    assert!(help("{\"a\": True}").contains("true"));
    assert!(help("{\"a\": 01}").contains("leading zeros"));
}

#[test]
fn two_values_are_e0104() {
    assert_eq!(code("{} {}"), "E0104");
    assert_eq!(code("{}é"), "E0104");
}

#[test]
fn other_top_levels_are_e0105() {
    for text in ["[]", "1", "null", "\"a\""] {
        assert_eq!(code(text), "E0105");
    }
}

#[test]
fn duplicate_keys_are_e0106_even_escaped() {
    assert_eq!(code(r#"{"a": 1, "a": 1}"#), "E0106");
    assert_eq!(code(r#"{"num_experts": 1, "num\u005fexperts": 1}"#), "E0106");
}

#[test]
fn control_characters_are_e0107_and_never_raw() {
    let error = parse("{\"a\\u0000b\": 1}").unwrap_err();
    assert_eq!(error.code.0, "E0107");
    assert!(!error.labels[0].text.contains('\0'));
    assert_eq!(code("{\"a\u{1}\": 1}"), "E0107");
}

#[test]
fn deep_nesting_is_e0108() {
    let text = "[".repeat(100_000);
    assert_eq!(code(&text), "E0108");
    let text = format!("{}{}", "{\"a\":".repeat(63), "{}") + &"}".repeat(63);
    assert_eq!(code(&text), "ok");
}

#[test]
fn size_limits_are_e0109_and_e0110() {
    assert_eq!(decode(&vec![b' '; (16 << 20) + 1]).unwrap_err().code.0, "E0109");
    let keys: Vec<String> = (0..=100_000).map(|i| format!("\"k{i}\":1")).collect();
    assert_eq!(code(&format!("{{{}}}", keys.join(","))), "E0110");
}

#[test]
fn values_know_their_place() {
    let text = r#"{"a": [1, {"b": -2.5e3}], "c": "\u00e9\ud83d\ude00"}"#;
    let value = parse_object(text).unwrap();
    let c = value.get("c").unwrap();
    assert_eq!(c.string(), Some("é😀"));
    assert_eq!(&text[c.span.start..c.span.end], r#""\u00e9\ud83d\ude00""#);
    let b = value.get("a").unwrap().array().unwrap()[1].get("b").unwrap();
    assert_eq!(&text[b.span.start..b.span.end], "-2.5e3");
}

#[test]
fn accepts_exactly_what_serde_json_accepts() {
    let good = r#"{"a": [1, -0, 0.5, 1e5, true, false, null, "x\n\t\"\\\/"], "b": {"c": {}}, "d": []}"#;
    // Every prefix and every single change of a byte: both parsers agree, except for names of
    // floats, duplicate keys and control characters, which have codes of their own.
    for i in 0..good.len() {
        for c in ['"', '{', ',', '0', 'e', ' ', '-', ']', ':', '.', '\\'] {
            let mut text = good[..i].to_owned();
            text.push(c);
            text.push_str(&good[i + 1..]);
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            match parse(&text) {
                Ok(_) => assert!(theirs.is_ok(), "{text}: {theirs:?}"),
                Err(e) if ["E0106", "E0107"].contains(&e.code.0) => {}
                Err(e) => assert!(theirs.is_err(), "{text}: {e:?}"),
            }
        }
        assert!(parse(&good[..i]).is_err());
    }
}
