//! Runs the binary, and what it needs.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    /// Exit code.
    pub code: i32,
    /// Text on stdout.
    pub out: String,
    /// Text on stderr.
    pub err: String,
}

/// Runs the binary in a folder, with text on stdin.
pub(crate) fn moec_in<S: AsRef<OsStr>>(folder: &Path, args: &[S], stdin: &str) -> Done {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moec"))
        .args(args)
        .current_dir(folder)
        .env_remove("CLICOLOR_FORCE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // The command may end before it has read everything.
    let _ = child.stdin.take().expect("stdin is a pipe").write_all(stdin.as_bytes());
    let output = child.wait_with_output().expect("the binary ends");
    Done {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A small model, in f32.
pub(crate) const TINY: &str = r#"{
  "architectures": ["MixtralForCausalLM"],
  "model_type": "mixtral",
  "torch_dtype": "float32",
  "hidden_act": "silu",
  "hidden_size": 48,
  "intermediate_size": 40,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "num_experts_per_tok": 2,
  "num_hidden_layers": 3,
  "num_local_experts": 6,
  "vocab_size": 100
}
"#;
