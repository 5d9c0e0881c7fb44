//! The report of `multi_gpu --report` as a browser shows it: a screenshot by headless Chromium,
//! looked at. Without Chromium, and in a debug build, the test counts as ignored and says why.
#![allow(missing_docs, clippy::print_stdout)]

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::Command;

const SINGLE: [u8; 3] = [0xc0, 0x39, 0x2b];
const TWO: [u8; 3] = [0x8e, 0x44, 0xad];
const ROUNDS: [u8; 3] = [0x2a, 0x9d, 0x5c];
const POLL: [u8; 3] = [0x1f, 0x6f, 0xb2];
const JOBS: [u8; 3] = [0xc9, 0xc2, 0xb0];
const PREEMPT: [u8; 3] = [0xe0, 0x8e, 0x2b];

fn main() {
    let shown =
        Trial::test("the_report_is_one_file_and_the_browser_shows_the_passes_overlap", look);
    let shown = match chromium() {
        Some(_) if cfg!(debug_assertions) => {
            shown.with_kind("long: cargo test --release --test report").with_ignored_flag(true)
        }
        Some(_) => shown,
        None => shown
            .with_kind("skipped: there is no Chromium (Debian: apt-get install chromium)")
            .with_ignored_flag(true),
    };
    libtest_mimic::run(&Arguments::from_args(), vec![shown]).exit();
}

fn chromium() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    named.or_else(|| {
        std::env::split_paths(&path)
            .flat_map(|dir| names.map(|name| dir.join(name)))
            .find(|file| file.is_file())
    })
}

fn run(command: &mut Command) -> Result<(), Failed> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }
}

fn look() -> Result<(), Failed> {
    let dir = std::env::temp_dir().join(format!("shootdown-report-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let looked = look_in(&dir);
    // Left there when something is wrong, to be looked at.
    if looked.is_ok() {
        std::fs::remove_dir_all(&dir)?;
    }
    looked
}

fn look_in(dir: &Path) -> Result<(), Failed> {
    let (report, shot) = (dir.join("report.html"), dir.join("report.png"));
    let cargo = ["run", "--quiet", "--release", "--example", "multi_gpu", "--", "--report"];
    run(Command::new(env!("CARGO"))
        .args(cargo)
        .arg(&report)
        .current_dir(env!("CARGO_MANIFEST_DIR")))?;
    let text = std::fs::read_to_string(&report)?;
    for elsewhere in ["<script", "<link", "<img", "src=", "href=", "@import", "url("] {
        if text.contains(elsewhere) {
            return Err(
                format!("{elsewhere} in {}: it needs another file", report.display()).into()
            );
        }
    }
    let flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        "--window-size=1120,1700",
    ];
    let chromium = chromium().ok_or("Chromium was there a moment ago")?;
    let profile = format!("--user-data-dir={}", dir.join("profile").display());
    let screenshot = format!("--screenshot={}", shot.display());
    run(Command::new(chromium).args(flags).args([
        profile,
        screenshot,
        format!("file://{}", report.display()),
    ]))?;

    let picture = Picture::read(&shot)?;
    // The curves of both charts, and the bars.
    let colors = [
        ("single-pass", SINGLE),
        ("two-pass", TWO),
        ("round-robin", ROUNDS),
        ("poll-driven", POLL),
        ("jobs", JOBS),
        ("preemption", PREEMPT),
    ];
    for (name, color) in colors {
        let pixels = (0..picture.height)
            .map(|y| picture.runs(y, color).map(|(from, to)| to - from).sum::<usize>())
            .sum::<usize>();
        if pixels < 800 {
            return Err(format!("{pixels} pixels of {name} in {}", shot.display()).into());
        }
    }
    // Flushes: where each ends. One GPU after the other they go on to the right edge; poll-driven
    // ones end long before.
    let ends = |color: [u8; 3]| -> Vec<u32> {
        let fill = format!("fill=\"#{:02X}{:02X}{:02X}\"", color[0], color[1], color[2]);
        let number = |tag: &str, name: &str| -> Option<u32> {
            tag.split_once(&format!(" {name}=\""))?.1.split('"').next()?.parse().ok()
        };
        let timeline = text.split_once("<div id=timeline>").map_or("", |(_, rest)| rest);
        let bars = timeline
            .split("<rect")
            .filter(|tag| tag.contains(&fill) && number(tag, "height") != Some(10));
        bars.filter_map(|tag| Some(number(tag, "x")? + number(tag, "width")?)).collect()
    };
    let (single, poll) = (ends(SINGLE), ends(POLL));
    let (last, soonest) =
        (single.iter().max().copied().unwrap_or(0), poll.iter().max().copied().unwrap_or(u32::MAX));
    if single.len() < 16 || poll.len() < 16 || soonest * 2 > last {
        return Err(format!(
            "flushes end at {single:?} in single-pass and at {poll:?} in poll-driven"
        )
        .into());
    }
    Ok(())
}

struct Picture {
    width: usize,
    height: usize,
    bytes: Vec<u8>,
    channels: usize,
}

impl Picture {
    fn read(path: &Path) -> Result<Self, Failed> {
        let mut reader =
            png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path)?)).read_info()?;
        let mut bytes =
            vec![0; reader.output_buffer_size().ok_or("a picture of a size that fits")?];
        let info = reader.next_frame(&mut bytes)?;
        let channels = info.color_type.samples();
        Ok(Self { width: info.width as usize, height: info.height as usize, bytes, channels })
    }

    /// Where a row has this color without a gap: from, to (exclusive).
    fn runs(&self, y: usize, color: [u8; 3]) -> impl Iterator<Item = (usize, usize)> {
        let at = move |x: usize| {
            &self.bytes[(y * self.width + x) * self.channels..][..3] == color.as_slice()
        };
        let mut x = 0;
        std::iter::from_fn(move || {
            let from = (x..self.width).find(|x| at(*x))?;
            x = (from..self.width).find(|x| !at(*x)).unwrap_or(self.width);
            Some((from, x))
        })
    }
}
