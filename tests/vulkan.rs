//! The example `vulkan` as a user runs it. Where there is no Vulkan loader or driver, or no
//! userfaultfd, these count as ignored, and say why. The processor's driver of Mesa is enough
//! (Debian: apt-get install mesa-vulkan-drivers libvulkan1 vulkan-validationlayers).
#![allow(missing_docs, unreachable_pub, clippy::print_stdout)]

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The example in release form, built here: `cargo test` does not.
fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let binary = BINARY.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args([
            "build",
            "--quiet",
            "--release",
            "--features",
            "cache,userfaultfd",
            "--example",
            "vulkan",
        ]);
        let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(built.success(), "the example cannot be built");
        let test = std::env::current_exe().expect("this program has a path");
        test.ancestors()
            .nth(3)
            .expect("it lies in the target directory")
            .join("release/examples/vulkan")
    });
    binary.clone()
}

fn run_with(arguments: &str, environment: &[(&str, &str)]) -> Output {
    // One at a time: passes are timed.
    static TURN: Mutex<()> = Mutex::new(());
    let binary = binary();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(&binary);
    command.args(arguments.split_whitespace()).envs(environment.iter().copied());
    command.output().unwrap_or_else(|error| panic!("{}: {error}", binary.display()))
}

fn vulkan(arguments: &str) -> Output {
    run_with(arguments, &[])
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// What it printed, when all was well.
fn report(arguments: &str) -> Value {
    let output = vulkan(&format!("--json {arguments}"));
    assert!(output.status.success(), "{arguments}: {}", error(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn upload<'a>(report: &'a Value, cache: &str, in_flight: bool) -> &'a Value {
    let rows = report["uploads"]["rows"].as_array().expect("uploads");
    rows.iter()
        .find(|row| row["cache"] == cache && row["in_flight"] == in_flight)
        .expect("a row of each kind")
}

fn number(row: &Value, field: &str) -> u64 {
    row[field].as_u64().unwrap_or_else(|| panic!("{field} in {row}"))
}

fn nothing_stale_arrives_while_a_plain_cache_uploads_old_memory() {
    let report = report("uploads --pages --uploads 600");
    assert_eq!(report["uploads"]["keeps_pages"], true);
    for in_flight in [false, true] {
        for cache in ["uffd", "owned"] {
            let row = upload(&report, cache, in_flight);
            assert_eq!((number(row, "wrong"), number(row, "uploads")), (0, 600), "{row}");
            assert!(number(row, "replaced") > 30 && number(row, "imports") > 64, "{row}");
        }
        let plain = upload(&report, "plain", in_flight);
        assert!(
            number(plain, "wrong") > 60 && number(plain, "wrong_words") > number(plain, "wrong"),
            "{plain}"
        );
        assert_eq!(number(plain, "imports"), 64, "{plain}");
    }
    // Pages that are kept cannot be seen to go too early: whether the job was done is asked.
    let (plain, owned) = (upload(&report, "plain", true), upload(&report, "owned", true));
    assert_eq!(number(plain, "unfinished"), number(plain, "replaced"), "{plain}");
    assert_eq!(number(owned, "unfinished"), 0, "{owned}");
    let asked = (
        &report["uploads"]["pages"],
        &report["uploads"]["replace_one_in"],
        &report["device"],
        &report["fault"],
    );
    assert_eq!(asked, (&Value::Bool(true), &Value::from(8), &Value::Null, &Value::Null));
    assert!(
        report["uploads"]["import_ns"].as_f64() > report["uploads"]["hit_ns"].as_f64(),
        "{report}"
    );
}

fn a_device_that_reads_by_address_is_waited_for_before_owned_memory_changes() {
    let report = report("uploads --uploads 600");
    for (cache, in_flight) in [("uffd", false), ("owned", false), ("owned", true)] {
        assert_eq!(number(upload(&report, cache, in_flight), "wrong"), 0, "{report}");
    }
    assert_eq!(number(upload(&report, "owned", true), "unfinished"), 0, "{report}");
    let plain = upload(&report, "plain", true);
    assert!(number(plain, "wrong") > 0, "{plain}");
    // The processor's driver pins nothing; then nothing is promised for `Uffd` with work in flight,
    // and the example says so.
    if report["uploads"]["keeps_pages"] == false {
        assert_eq!(
            number(plain, "wrong"),
            number(plain, "replaced"),
            "each upload that was in flight: {plain}"
        );
        assert_eq!(upload(&report, "uffd", true)["expected"], "open");
        let text = vulkan("uploads --uploads 64").stdout;
        assert!(String::from_utf8_lossy(&text).contains("Uffd hears of a change after it"));
    }
}

fn devices_are_waited_for_all_at_once_or_one_after_the_other() {
    let picture = std::env::temp_dir().join(format!("shootdown-vulkan-{}.svg", std::process::id()));
    let report = report(&format!("passes --devices 1,4 --repeats 5 --plot {}", picture.display()));
    let text = std::fs::read_to_string(&picture).expect("a picture");
    std::fs::remove_file(&picture).expect("it was there");
    assert!(
        text.contains("one after the other, total") && text.contains("all at once, slowest wait")
    );
    let rows = report["passes"]["rows"].as_array().expect("passes");
    let row = |devices, mode| {
        rows.iter()
            .find(|row| row["devices"] == devices && row["mode"] == mode)
            .expect("a row of each kind")
    };
    for row in rows {
        assert_eq!((number(row, "stale_words"), number(row, "unfinished")), (0, 0), "{row}");
        assert!(
            number(row, "slowest_ns") <= number(row, "sum_ns")
                && number(row, "slowest_ns") > 1_000_000,
            "{row}"
        );
    }
    let (one, all) = (row(4, "one-by-one"), row(4, "all-at-once"));
    assert!(number(one, "total_ns") >= number(one, "sum_ns"), "the sum of the waits: {one}");
    assert_eq!(number(one, "overlapping"), 0, "{one}");
    assert!(
        number(all, "overlapping") > 0 && number(all, "total_ns") < number(all, "sum_ns"),
        "less than the sum: {all}"
    );
    assert!(number(all, "total_ns") < number(one, "total_ns"), "{all}, {one}");
}

fn copies_are_work_too() {
    let report = report("passes --work copy --work-ms 1 --devices 2 --repeats 2");
    for row in report["passes"]["rows"].as_array().expect("passes") {
        assert_eq!((number(row, "stale_words"), number(row, "unfinished")), (0, 0), "{row}");
    }
}

fn the_validation_layer_has_nothing_to_say() {
    for part in [
        "uploads --uploads 200",
        "uploads --pages --uploads 200",
        "passes --devices 1,2 --repeats 2",
        "passes --work copy --devices 2 --repeats 1 --work-ms 1",
    ] {
        let report = report(&format!("{part} --validate"));
        assert_eq!(report["validation"], Value::Array(Vec::new()), "{part}");
    }
}

fn what_the_validation_layer_says_is_reported_beside_an_error() {
    let chatty = [("VK_LAYER_ENABLES", "VK_VALIDATION_FEATURE_ENABLE_BEST_PRACTICES_EXT")];
    let output = run_with(
        "passes --devices 1 --repeats 1 --work-ms 1 --validate --plot /does/not/exist.svg",
        &chatty,
    );
    assert_eq!(output.status.code(), Some(2), "{}", error(&output));
    for says in ["the validation layer says: ", "the picture /does/not/exist.svg"] {
        assert!(error(&output).contains(says), "{}", error(&output));
    }
}

fn planted_bugs_are_found() {
    for (fault, says) in [
        ("uploads --pages --uploads 400 --fault unwatched", "Uffd, idle: "),
        ("uploads --pages --uploads 400 --fault unwatched", "OwnedMapping, idle: "),
        // Whether or not the device keeps pages.
        ("uploads --uploads 400 --fault skip-wait", "OwnedMapping, in flight: "),
        (
            "uploads --uploads 400 --fault skip-wait --pages",
            "changes returned before the job was done",
        ),
        (
            "passes --devices 2 --repeats 1 --fault skip-wait",
            "2 times the memory had changed before a device's work was done",
        ),
    ] {
        let output = vulkan(fault);
        assert_eq!(output.status.code(), Some(1), "{fault}");
        assert!(error(&output).contains(says), "{fault}: {}", error(&output));
    }
}

fn a_run_that_shows_nothing_says_so() {
    let output = vulkan("uploads --uploads 20 --replace-one-in 4000000000");
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).contains("nothing was shown"), "{}", error(&output));
}

fn wrong_options_are_named_and_exit_with_2() {
    for (options, says) in [
        ("--uploads 0", "--uploads"),
        ("--devices 1,0", "--devices"),
        ("--device no-such-card", "there is none of this name, but: "),
        ("uploads --plot /tmp/none.svg", "no picture without passes"),
        (
            "passes --devices 1 --repeats 1 --work-ms 1 --plot /does/not/exist.svg",
            "the picture /does/not/exist.svg",
        ),
        ("elsewhere", "possible values: uploads, passes"),
    ] {
        let output = vulkan(options);
        assert_eq!(output.status.code(), Some(2), "{options}: {}", error(&output));
        assert!(error(&output).contains(says), "{options}: {}", error(&output));
    }
    // The picture is all that such a run lacks.
    let table =
        vulkan("passes --devices 1 --repeats 1 --work-ms 1 --plot /does/not/exist.svg").stdout;
    assert!(String::from_utf8_lossy(&table).contains("words of changed memory"));
    let help = String::from_utf8_lossy(&vulkan("--help").stdout).into_owned();
    for option in ["--pages", "--fence-fd", "--validate", "--work", "--plot", "Exit codes"] {
        assert!(help.contains(option), "{option}");
    }
}

fn without_a_driver_or_a_loader_it_says_so_and_exits_with_3() {
    // No file that names a driver, and drivers that find no device: with a loader that knows this,
    // Mesa's for cards alone.
    for without in [
        &[("VK_DRIVER_FILES", "/does/not/exist"), ("VK_ICD_FILENAMES", "/does/not/exist")][..],
        &[("VK_LOADER_DRIVERS_DISABLE", "*lvp*,*nvidia*,*radeon*,*intel_icd*")],
        &[("VK_LOADER_DRIVERS_DISABLE", "*")],
    ] {
        let none = run_with("passes", without);
        assert_eq!(none.status.code(), Some(3), "{without:?}: {}", error(&none));
        assert!(error(&none).contains("no Vulkan"), "{without:?}: {}", error(&none));
    }
    let dir = std::env::temp_dir().join(format!("shootdown-no-loader-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("libvulkan.so.1"), "no library").expect("a file");
    let none = run_with("passes", &[("LD_LIBRARY_PATH", dir.to_str().expect("a path"))]);
    std::fs::remove_dir_all(&dir).expect("it was there");
    assert_eq!(none.status.code(), Some(3), "{}", error(&none));
    assert!(error(&none).contains("no Vulkan loader"), "{}", error(&none));
}

/// Why these cannot run: with a loader and a driver, with userfaultfd besides, with the validation
/// layer besides.
struct Lacking {
    driver: Option<String>,
    source: Option<String>,
    layer: Option<String>,
}

fn lacking() -> Lacking {
    let said = |output: &Output| error(output).trim_start_matches("error: ").to_owned();
    let reason = |output: &Output| (output.status.code() == Some(3)).then(|| said(output));
    let passes = vulkan("passes --devices 1 --repeats 1 --work-ms 1 --validate");
    let driver = reason(&passes);
    let source = driver.clone().or_else(|| reason(&vulkan("uploads --uploads 1")));
    let looks = !error(&passes).contains("the validation layer is not installed");
    let layer =
        source.clone().or_else(|| (!looks).then(|| "the validation layer is not installed".into()));
    Lacking { driver, source, layer }
}

fn main() {
    let arguments = Arguments::from_args();
    let Lacking { driver, source, layer } = if arguments.list {
        Lacking { driver: None, source: None, layer: None }
    } else {
        lacking()
    };
    macro_rules! named {
        ($($lacking:ident: $test:ident),* $(,)?) => {
            [$((stringify!($test), $test as fn(), &$lacking)),*]
        };
    }
    let nothing = None;
    let trials = named![
        source: nothing_stale_arrives_while_a_plain_cache_uploads_old_memory,
        source: a_device_that_reads_by_address_is_waited_for_before_owned_memory_changes,
        driver: devices_are_waited_for_all_at_once_or_one_after_the_other,
        driver: copies_are_work_too,
        layer: the_validation_layer_has_nothing_to_say,
        layer: what_the_validation_layer_says_is_reported_beside_an_error,
        source: planted_bugs_are_found,
        source: a_run_that_shows_nothing_says_so,
        driver: wrong_options_are_named_and_exit_with_2,
        nothing: without_a_driver_or_a_loader_it_says_so_and_exits_with_3,
    ];
    let trials = trials.into_iter().map(|(name, test, lacking)| {
        let trial = Trial::test(name, move || -> Result<(), Failed> {
            test();
            Ok(())
        });
        match lacking {
            None => trial,
            Some(why) => trial.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
        }
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
