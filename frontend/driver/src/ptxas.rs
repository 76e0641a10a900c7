//! NVIDIA's assembler: where it may be, and PTX to cubin.

use crate::Error;
use moec_ir::Code;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Longest time that one module may take.
const LIMIT: Duration = Duration::from_secs(120);

/// An assembler that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ptxas {
    /// Where it is.
    pub path: PathBuf,
    /// What it calls itself, such as `V12.8.93`.
    pub version: String,
}

/// The assembler, and every place that was looked at.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The first that works.
    pub found: Option<Ptxas>,
    /// Places in the order in which they were looked at.
    pub looked: Vec<PathBuf>,
}

/// Folders of Python packages that hold an assembler, below a `site-packages`.
const PACKAGES: [&str; 3] = ["nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin"];

fn python_folders() -> Vec<PathBuf> {
    let script =
        "import site, sysconfig; print('\\n'.join([sysconfig.get_paths()['purelib'], site.getusersitepackages()]))";
    let output = Command::new("python3").args(["-c", script]).stdin(Stdio::null()).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().flat_map(|line| PACKAGES.map(|p| Path::new(line).join(p))).collect()
}

/// Looks for the assembler: `PATH`, `$CUDA_HOME/bin`, `/usr/local/cuda*/bin`, Python packages.
pub fn find() -> Search {
    let mut search = Search::default();
    let of_path = env::var_os("PATH").map(|p| env::split_paths(&p).collect::<Vec<_>>()).unwrap_or_default();
    let home = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(|h| PathBuf::from(h).join("bin"));
    let mut installed: Vec<PathBuf> = fs::read_dir("/usr/local")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda")))
        .map(|p| p.join("bin"))
        .collect();
    installed.sort();
    let first: Vec<PathBuf> = of_path.into_iter().chain(home).chain(installed.into_iter().rev()).collect();
    let tried = |folder: PathBuf, search: &mut Search| {
        let path = folder.join("ptxas");
        if search.found.is_none() && !search.looked.contains(&path) {
            search.found = version(&path).map(|version| Ptxas { path: path.clone(), version });
            search.looked.push(path);
        }
    };
    first.into_iter().for_each(|f| tried(f, &mut search));
    if search.found.is_none() {
        python_folders().into_iter().for_each(|f| tried(f, &mut search));
    }
    search
}

/// The assembler of this machine; looked for once.
pub fn found() -> Option<&'static Ptxas> {
    static FOUND: OnceLock<Option<Ptxas>> = OnceLock::new();
    FOUND.get_or_init(|| find().found).as_ref()
}

fn version(path: &Path) -> Option<String> {
    if !path.is_file() {
        return None;
    }
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text.split_whitespace().find(|w| w.starts_with('V') && w.contains('.'))?;
    Some(word.to_owned())
}

impl Ptxas {
    /// PTX to a cubin for `target`.
    ///
    /// # Errors
    /// It cannot be run (E0503), takes too long (E0504), or refuses our code (our bug).
    pub fn assemble(&self, ptx: &[u8], target: &str) -> Result<Vec<u8>, Error> {
        let help = "compile with `--no-cubin`, which leaves PTX alone";
        let broken = |what: String| Error::machine(Code("E0503"), format!("{}: {what}", self.path.display()), help);
        let folder = tempfile::tempdir().map_err(|e| broken(format!("no temporary folder: {e}")))?;
        let (source, result) = (folder.path().join("kernel.ptx"), folder.path().join("kernel.cubin"));
        let messages = folder.path().join("messages");
        fs::write(&source, ptx).map_err(|e| broken(e.to_string()))?;
        let log = fs::File::create(&messages).map_err(|e| broken(e.to_string()))?;
        let mut child = Command::new(&self.path)
            .arg(format!("-arch={target}"))
            // Kernels of a module side by side.
            .arg("--split-compile=0")
            .arg(&source)
            .arg("-o")
            .arg(&result)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| broken(e.to_string()))?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(|e| broken(e.to_string()))? {
                break status;
            }
            if start.elapsed() > LIMIT {
                // It may be gone by now.
                let _ = child.kill();
                let _ = child.wait();
                let message = format!("{} did not end within {} s", self.path.display(), LIMIT.as_secs());
                return Err(Error::machine(Code("E0504"), message, help));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if !status.success() {
            let said = fs::read_to_string(&messages).unwrap_or_default();
            return Err(Error::Internal(format!("ptxas {} refused generated code: {}", self.version, said.trim())));
        }
        fs::read(&result).map_err(|e| broken(e.to_string()))
    }
}
