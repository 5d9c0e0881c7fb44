//! One boot of the guest: disks as files, the back-end's processes, QEMU, and what the guest says.

use crate::pattern;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{env, thread};
use tempfile::TempDir;

/// The seed of what is in the disks.
pub const SEED: u16 = 7;
/// A kernel that says more than so many lines has lost its mind.
const MOST_LINES: usize = 1000;
/// The job `disk` says so when it has requests in flight.
const BEGUN: &str = "GUEST {\"begun\"";
/// Lines of the console that an error shows.
const SHOWN_LINES: usize = 60;
/// QEMU's monitor, in the folder of a boot.
const MONITOR: &str = "monitor";
/// Between two stops, and during one.
const WORKING: Duration = Duration::from_millis(100);
const STILL: Duration = Duration::from_millis(20);
/// How long a back-end may take to begin and to end.
const SOON: Duration = Duration::from_secs(10);

const PACKAGE: &str = env!("CARGO_MANIFEST_DIR");

/// Cargo's folder for what is built for and with the guest, as `guest.sh` has it.
fn folder() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(PACKAGE).join("../../target"), PathBuf::from);
    target.join("guest")
}

/// What this machine lacks for a guest.
pub fn missing() -> Option<String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Some("the guest is built for Linux on x86-64".to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|folder| folder.join("qemu-system-x86_64").is_file()) {
        return Some("there is no qemu-system-x86_64".to_owned());
    }
    let kernel = env::var_os("SHOOTDOWN_GUEST_KERNEL")
        .map_or_else(|| folder().join("kernel"), PathBuf::from);
    if !kernel.join("boot").is_dir() {
        return Some(format!(
            "there is no kernel for a guest in {}: crates/shootdown-vhost/guest.sh fetch",
            kernel.display()
        ));
    }
    let cargo = Command::new(env!("CARGO")).arg("--version").output();
    cargo.err().map(|error| format!("cargo cannot be run by this user: {error}"))
}

/// Names another program with the example's options.
const BACKEND: &str = "SHOOTDOWN_BACKEND";

/// Why there is no back-end.
pub fn no_backend() -> Option<String> {
    if env::var_os(BACKEND).is_some() {
        return None;
    }
    let source = Path::new(PACKAGE).join("examples/blk.rs").exists()
        || Path::new(PACKAGE).join("examples/blk").exists();
    (!source).then(|| "this package has no example `blk`".to_owned())
}

/// The kernel and the initramfs, built once.
fn image() -> &'static [PathBuf; 2] {
    static IMAGE: OnceLock<[PathBuf; 2]> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let output = guest_sh().arg("image").env("CARGO", env!("CARGO")).output().unwrap();
        assert!(
            output.status.success(),
            "guest.sh image: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let lines = String::from_utf8(output.stdout).unwrap();
        lines.lines().map(PathBuf::from).collect::<Vec<_>>().try_into().unwrap()
    })
}

fn guest_sh() -> Command {
    Command::new(Path::new(PACKAGE).join("guest.sh"))
}

/// The example, built once and optimised.
fn backend() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(program) = env::var_os(BACKEND) {
            return program.into();
        }
        // Beside this test, where it is mostly there already: deps/qemu-… is two folders down.
        let program = env::current_exe().unwrap();
        let target = program.ancestors().nth(3).unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(PACKAGE).args([
            "build",
            "--quiet",
            "--release",
            "--example",
            "blk",
            "--target-dir",
        ]);
        let output = cargo.arg(target).output().unwrap();
        assert!(
            output.status.success(),
            "the example: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        target.join("release/examples/blk")
    })
}

/// Who serves the disks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// By the back-end, in a process for each.
    Processes,
    /// By the back-end in one process, with the devices in one IOMMU domain or each in its own.
    OneProcess { domain: bool },
    /// By QEMU itself, with so many operations per second (0: no limit).
    Qemu { throttle: u32 },
}

/// What is booted.
#[derive(Clone)]
pub struct Setup {
    pub served: Served,
    pub job: &'static str,
    /// What the job is told, besides the size and the seed.
    pub set: Vec<(&'static str, u64)>,
    pub devices: usize,
    pub queues: u32,
    pub cpus: u32,
    /// Unmapped at once, or lazily.
    pub strict: bool,
    pub iommu: bool,
    pub shared_slot: bool,
    /// Of the back-end.
    pub latency: Duration,
    pub fault: Option<&'static str>,
    /// The size of each disk.
    pub mib: u64,
    /// Whether the disks have their words before the guest begins.
    pub filled: bool,
    /// Before this guest, another one with the same back-end is killed in the middle of its job.
    pub kill_one_before: bool,
    /// So often QEMU stops the guest in the middle of its job, and lets it go on.
    pub stops: u32,
    /// How long the boot with its job may take.
    pub patience: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            served: Served::Processes,
            job: "disk",
            set: Vec::new(),
            devices: 1,
            queues: 1,
            cpus: 1,
            strict: false,
            iommu: true,
            shared_slot: false,
            latency: Duration::ZERO,
            fault: None,
            mib: 64,
            filled: false,
            kill_one_before: false,
            stops: 0,
            patience: Duration::from_secs(90),
        }
    }
}

/// Ended with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A back-end's process, and where it writes its figures.
struct Backend {
    process: Process,
    stats: PathBuf,
}

/// What has been seen of one boot.
pub struct Seen {
    /// The guest's results, without its last line.
    pub results: Vec<Value>,
    /// The figures of each device of the back-end.
    pub stats: Vec<Value>,
    /// The guest's own error, or that it has not come to its end: it has crashed, or hangs.
    pub error: Option<String>,
    /// The disks, while this lives.
    pub files: Vec<PathBuf>,
    _folder: TempDir,
}

impl Setup {
    /// Boots, and waits for the guest's end. A back-end that ends before its front-end is a panic.
    pub fn boot(&self) -> Seen {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let files: Vec<PathBuf> =
            (0..self.devices).map(|disk| path(&format!("disk{disk}"))).collect();
        for (disk, file) in files.iter().enumerate() {
            create(file, disk, self.mib << 20, self.filled);
        }
        let sockets: Vec<PathBuf> =
            (0..self.devices).map(|disk| path(&format!("socket{disk}"))).collect();
        let mut backends = self.start_backends(&sockets, &files, folder.path());

        if self.kill_one_before {
            let (qemu, console) = self.start_qemu(&sockets, &files, folder.path());
            let begun = console.iter().any(|line| line.contains(BEGUN));
            drop(qemu);
            assert!(begun, "{}", log(folder.path(), "qemu"));
        }
        let (qemu, console) = self.start_qemu(&sockets, &files, folder.path());
        let (stops, monitor) = (self.stops, path(MONITOR));
        let (results, error) = listen(&console, self.patience, || stop_and_go(stops, &monitor));
        drop(qemu);

        let mut stats = Vec::new();
        for (index, backend) in backends.iter_mut().enumerate() {
            if let Some(status) = backend.process.0.try_wait().unwrap() {
                let log = log(folder.path(), &format!("backend{index}"));
                assert!(status.success(), "a back-end has ended with {status}: {log}");
            }
            stats.extend(backend.end());
        }
        let error = error.map(|error| format!("{error}\n{}", log(folder.path(), "qemu")));
        Seen { results, stats, error, files, _folder: folder }
    }

    /// QEMU, and the lines of the guest's console.
    fn start_qemu(
        &self,
        sockets: &[PathBuf],
        files: &[PathBuf],
        folder: &Path,
    ) -> (Process, Receiver<String>) {
        let [kernel, initramfs] = image();
        let mut command = guest_sh();
        command.args(["boot", "--job", self.job, "--image"]).args([kernel, initramfs]);
        for (file, socket) in files.iter().zip(sockets) {
            match self.served {
                Served::Qemu { throttle } => {
                    command.arg("--own").arg(file).args(["--throttle", &throttle.to_string()])
                }
                _ => command.arg("--socket").arg(socket),
            };
        }
        command.args(["--queues", &self.queues.to_string(), "--cpus", &self.cpus.to_string()]);
        let flags = [
            ("--strict", self.strict),
            ("--no-iommu", !self.iommu),
            ("--shared-slot", self.shared_slot),
        ];
        command.args(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag));
        if self.stops > 0 {
            command.arg("--monitor").arg(folder.join(MONITOR));
        }
        for (name, value) in [("mib", self.mib), ("seed", SEED.into())].iter().chain(&self.set) {
            command.args(["--set", &format!("{name}={value}")]);
        }
        let errors = File::create(folder.join("qemu.log")).unwrap();
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let mut qemu = Process(child);
        let console = lines(qemu.0.stdout.take().unwrap());
        (qemu, console)
    }

    fn start_backends(
        &self,
        sockets: &[PathBuf],
        files: &[PathBuf],
        folder: &Path,
    ) -> Vec<Backend> {
        let disks: Vec<_> = sockets.iter().zip(files).collect();
        let (each, domain) = match self.served {
            Served::Processes => (1, false),
            Served::OneProcess { domain } => (disks.len(), domain),
            Served::Qemu { .. } => return Vec::new(),
        };
        let start = |(index, disks): (usize, &[(&PathBuf, &PathBuf)])| {
            let stats = folder.join(format!("stats{index}.json"));
            let mut command = Command::new(backend());
            for (socket, file) in disks {
                command.arg("--socket").arg(socket).arg("--file").arg(file);
            }
            command.args(["--queues", &self.queues.to_string()]).arg("--stats").arg(&stats);
            if !self.latency.is_zero() {
                command.args(["--latency-ms", &self.latency.as_millis().to_string()]);
            }
            if let Some(fault) = self.fault {
                command.args(["--fault", fault]);
            }
            if domain {
                command.arg("--domain");
            }
            let log = File::create(folder.join(format!("backend{index}.log"))).unwrap();
            let child = command
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            Backend { process: Process(child), stats }
        };
        let mut backends: Vec<Backend> = disks.chunks(each).enumerate().map(start).collect();
        // QEMU does not wait for a socket that is not there yet.
        let begun = Instant::now();
        while !sockets.iter().all(|socket| socket.exists()) {
            let ended =
                backends.iter_mut().any(|backend| backend.process.0.try_wait().unwrap().is_some());
            assert!(
                !ended && begun.elapsed() < SOON,
                "a back-end does not listen: {}",
                log(folder, "backend0")
            );
            thread::sleep(Duration::from_millis(5));
        }
        backends
    }
}

impl Backend {
    /// Asks it to end; its figures, one object for each device.
    fn end(&mut self) -> Vec<Value> {
        let begun = Instant::now();
        let pid = rustix::process::Pid::from_child(&self.process.0);
        while self.process.0.try_wait().unwrap().is_none() && begun.elapsed() < SOON {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        let text = fs::read_to_string(&self.stats).unwrap_or_default();
        let values =
            serde_json::Deserializer::from_str(&text).into_iter::<Value>().map(Result::unwrap);
        // One after the other, or in an array.
        let devices = values.flat_map(|value| match value {
            Value::Array(devices) => devices,
            device => vec![device],
        });
        devices.collect()
    }
}

/// Stops the guest so often, and lets it go on, while its job runs.
fn stop_and_go(stops: u32, monitor: &Path) {
    if stops == 0 {
        return;
    }
    let mut monitor = UnixStream::connect(monitor).unwrap();
    thread::spawn(move || {
        // A prompt, `(qemu)`, is the answer; the first comes unasked.
        let mut answers = BufReader::new(monitor.try_clone().unwrap());
        let mut answered = answers.read_until(b')', &mut Vec::new()).is_ok();
        for command in ["stop", "cont"].into_iter().cycle().take(2 * stops as usize) {
            // The guest works for a while, and is still for a while.
            thread::sleep(if command == "stop" { WORKING } else { STILL });
            answered = answered
                && writeln!(monitor, "{command}").is_ok()
                && answers.read_until(b')', &mut Vec::new()).is_ok();
            if !answered {
                // QEMU has ended, with the job.
                return;
            }
        }
    });
}

/// A disk of zeros, or with its words.
fn create(file: &Path, disk: usize, bytes: u64, filled: bool) {
    let mut file = File::create(file).unwrap();
    if filled {
        let mut part = vec![0; 1 << 20];
        for offset in (0..bytes).step_by(part.len()) {
            pattern::fill(&mut part, SEED, disk, offset);
            file.write_all(&part).unwrap();
        }
    }
    file.set_len(bytes).unwrap();
}

/// What a process has said.
fn log(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(format!("{name}.log"))).unwrap_or_default()
}

/// The console's lines.
fn lines(console: impl Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    receive
}

/// The results until the guest's end, and what went wrong.
fn listen(
    console: &Receiver<String>,
    patience: Duration,
    begun_now: impl FnOnce(),
) -> (Vec<Value>, Option<String>) {
    let mut begun_now = Some(begun_now);
    let begun = Instant::now();
    let (mut results, mut others, mut ended) = (Vec::new(), Vec::new(), None);
    let why = loop {
        let line = match console.recv_timeout(patience.saturating_sub(begun.elapsed())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break "has crashed".to_owned(),
            Err(RecvTimeoutError::Timeout) => break format!("has not ended within {patience:?}"),
        };
        // Before the first one are the firmware's control characters.
        let Some((_, text)) = line.split_once("GUEST ") else {
            others.push(line);
            if others.len() > MOST_LINES {
                break "has crashed".to_owned();
            }
            continue;
        };
        if line.contains(BEGUN) {
            begun_now.take().into_iter().for_each(|begun| begun());
            continue;
        }
        let value: Value =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        match (value.get("end"), value.get("error")) {
            (Some(_), _) => ended = Some(None),
            (None, Some(error)) => ended = Some(Some(format!("the guest says: {error}"))),
            (None, None) => results.push(value),
        }
    };
    others.truncate(SHOWN_LINES);
    (results, ended.unwrap_or_else(|| Some(format!("the guest {why}:\n{}", others.join("\n")))))
}

impl Seen {
    /// The same, of a guest that has come to its end.
    pub fn whole(self) -> Self {
        if let Some(error) = &self.error {
            panic!("{error}");
        }
        assert!(!self.results.is_empty());
        self
    }

    /// What is printed of each boot: the guest's results, the back-end's figures, and the error's
    /// first line.
    pub fn print(&self, title: &str) {
        self.results.iter().chain(&self.stats).for_each(|object| println!("{title}: {object}"));
        if let Some(line) = self.error.as_deref().and_then(|error| error.lines().next()) {
            println!("{title}: {line}");
        }
    }

    /// A number of each result.
    pub fn each(&self, name: &str) -> Vec<u64> {
        self.results.iter().map(|result| number(result, name)).collect()
    }

    pub fn sum(&self, name: &str) -> u64 {
        self.each(name).iter().sum()
    }

    /// A number of each device of the back-end.
    pub fn stat(&self, name: &str) -> Vec<u64> {
        assert_eq!(self.stats.len(), self.files.len(), "each device has its figures");
        self.stats.iter().map(|stats| number(stats, name)).collect()
    }

    /// What the host has in the disk's file: how many words are not those of the pattern, and the
    /// sum.
    pub fn host_view(&self, disk: usize) -> (u64, u64) {
        let file = File::open(&self.files[disk]).unwrap();
        let mut part = vec![0; 1 << 20];
        let (mut wrong, mut sum) = (0, 0_u64);
        for offset in (0..file.metadata().unwrap().len()).step_by(part.len()) {
            file.read_exact_at(&mut part, offset).unwrap();
            wrong += pattern::wrong(&part, SEED, disk, offset);
            sum = sum.wrapping_add(pattern::sum(&part, offset));
        }
        (wrong, sum)
    }
}

/// The number of that name in an object.
pub fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {object}"))
}
