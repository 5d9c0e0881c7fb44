//! Rules of the source: foreign code is called in one module, tricks stand in one folder, and lower
//! modules never import higher ones.
#![cfg(not(any(loom, shuttle, miri)))]
#![allow(missing_docs)]

use std::path::{Path, PathBuf};

/// Returns the files below `src`, by path, without comments and without their unit tests.
fn sources() -> Vec<(String, String)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let code = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let end = text.find("mod tests {").unwrap_or(text.len());
        let lines =
            text[..end].lines().map(|line| line.split("//").next().unwrap_or_default().to_owned());
        lines.collect::<Vec<_>>().join("\n")
    };
    let name =
        |path: &PathBuf| path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
    files.retain(|path| !path.ends_with("tests.rs"));
    let sources: Vec<_> = files.iter().map(|path| (name(path), code(path))).collect();
    assert!(
        sources.len() > 40,
        "{} files of source are too few: is the search right?",
        sources.len()
    );
    sources
}

/// Text that is a call of foreign code, and the files in which it may stand. All other calls go
/// through `foreign`.
const ROOMS: [(&str, &[&str]); 12] = [
    // Keeping and resuming panics.
    ("catch_unwind", &["foreign.rs"]),
    ("resume_unwind", &["foreign.rs"]),
    // The library keeps wakers as `TaskWaker`s. The fault injector is a notifier of its own.
    (".wake()", &["test_util.rs"]),
    // The check of C7 wakes the poller's own waker, in `Losses::run`.
    (
        ".wake_by_ref()",
        &["foreign.rs", "engine/nesting.rs", "engine/nesting/passes.rs", "test_util.rs"],
    ),
    // In `nesting/passes.rs` it is the waker of a join, which is the library's own.
    ("waker().clone()", &["foreign.rs", "engine/nesting/passes.rs"]),
    ("waker.clone()", &["foreign.rs", "engine/nesting/passes.rs"]),
    // Subscribers and recorders: `observe` wraps each call in `tell`.
    ("tracing::", &["observe.rs"]),
    ("metrics::", &["observe.rs"]),
    // `entry` calls notifiers with a token that only `foreign` makes.
    ("notifier.invalidate(", &["entry.rs", "test_util.rs"]),
    (".notifier }.name()", &["entry.rs"]),
    // The reporter and the clock.
    ("reporter(", &["foreign.rs"]),
    ("clock()", &["engine/host.rs"]),
];

/// Returns whether a file is above the engine. The cache and the sources are drivers and tasks of
/// their own, and call foreign code by rules M and K.
fn is_above(file: &str) -> bool {
    file.starts_with("cache/") || file.starts_with("source/") || file.starts_with("docs/")
}

#[test]
fn f1_foreign_code_is_called_in_one_room() {
    let sources = sources();
    for (text, rooms) in ROOMS {
        let mut found = 0;
        for (file, code) in sources.iter().filter(|(file, _)| !is_above(file)) {
            let stands = code.contains(text);
            assert!(
                !stands || rooms.contains(&file.as_str()),
                "{file} has {text:?}, which belongs into {rooms:?}"
            );
            found += usize::from(stands);
        }
        let may_be_absent = [".wake()", "waker().clone()"].contains(&text);
        assert!(found > 0 || may_be_absent, "{text:?} stands nowhere: has the code changed?");
    }
}

/// Checks what the files of a folder of the engine may name.
#[test]
fn the_state_calls_nobody_and_work_does_not_know_it() {
    let sources = sources();
    let forbidden: [(&str, &[&str]); 3] = [
        (
            "engine/state/",
            &[
                "Shared",
                "keep(",
                "losses",
                "rouse",
                "engine::lease",
                "engine::running",
                "engine::futures",
                "host",
            ],
        ),
        (
            "engine/work/",
            &[
                "Shared",
                "&mut State",
                "Outbox",
                "engine::futures",
                "engine::lease",
                "engine::running",
            ],
        ),
        ("protocol", &["Lock", "Waker", "engine::", "foreign", "std::"]),
    ];
    for (folder, texts) in forbidden {
        let files: Vec<_> = sources
            .iter()
            .filter(|(file, _)| file.starts_with(folder) && !file.ends_with("tests.rs"))
            .collect();
        assert!(files.len() > 1, "{folder}");
        for (file, code) in files {
            for text in texts {
                assert!(!code.contains(text), "{file} has {text:?}");
            }
        }
    }
}

/// Text that is there for nanoseconds only, and the files of the engine in which it may stand. What
/// is forced inline outside of `quick` is a part of its pieces.
const TRICKS: [(&str, &[&str]); 4] = [
    ("ManuallyDrop", &["engine/quick/"]),
    ("mem::forget", &["engine/quick/"]),
    (
        "inline(always)",
        &[
            "engine/quick/",
            "engine/running.rs",
            "engine/work/first_passes.rs",
            "engine/work/passes.rs",
        ],
    ),
    ("usize::MAX", &[]),
];

#[test]
fn the_tricks_of_the_engine_stand_in_one_folder() {
    let sources = sources();
    let engine: Vec<_> = sources.iter().filter(|(file, _)| file.starts_with("engine/")).collect();
    assert!(engine.len() > 30, "{} files are too few: is the search right?", engine.len());
    for (text, rooms) in TRICKS {
        let mut found = 0;
        for (file, _) in engine.iter().filter(|(_, code)| code.contains(text)) {
            let belongs = rooms.iter().any(|room| file.starts_with(room));
            assert!(belongs, "{file} has {text:?}, which belongs into {rooms:?}");
            found += 1;
        }
        assert!(found > 0 || rooms.is_empty(), "{text:?} stands nowhere: has the code changed?");
    }
}

/// Checks that each module imports only modules below it, in the order in which `lib.rs` maps them.
#[test]
fn lower_modules_never_import_higher_ones() {
    const ORDER: [&str; 21] = [
        "test_util",
        "cache",
        "source",
        "mirror",
        "subscription",
        "space",
        "engine",
        "observe",
        "entry",
        "notifier",
        "pass",
        "protocol",
        "index",
        "timeline",
        "foreign",
        "tally",
        "fork",
        "block",
        "sync",
        "event",
        "range",
    ];
    let height = |module: &str| ORDER.iter().position(|known| *known == module);
    for (file, code) in sources() {
        let module = file.split(['/', '.']).next().unwrap_or_default();
        let Some(own) = height(module) else { continue };
        for used in code.split("use crate::").skip(1) {
            let used = used.split([':', ';', ' ', '{']).next().unwrap_or_default();
            // Neither a list nor an item of `lib.rs`, which is above all: it would go unseen here.
            let is_module = used.starts_with(|c: char| c.is_ascii_lowercase());
            assert!(is_module, "{file} imports from the top: name the module");
            // `space` and `subscription` are two halves of one thing; names at the top are
            // re-exports.
            let pair = ["space", "subscription"].contains(&module)
                && ["space", "subscription"].contains(&used);
            if let Some(theirs) = height(used) {
                assert!(theirs >= own || pair, "{file} imports {used}, which stands above it");
            }
        }
    }
}

/// Checks W1: every public future has `wait`, and public functions return only such futures.
#[test]
fn w1_a_thread_can_wait_for_every_public_future() {
    let sources = sources();
    let name = |text: &str| {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()
    };
    // The type of `impl<...> [Future for] Type<...> {`.
    let implements = |block: &str, of: &str| {
        let header = block.split('{').next().unwrap_or_default();
        let header = header.split("where").next().unwrap_or_default();
        match (of, header.split_once(" for ")) {
            ("", None) => {
                // Behind the parameters.
                let mut depth = 0i32;
                let own = header.find(|c| {
                    depth += i32::from(c == '<') - i32::from(c == '>');
                    depth == 0 && c == ' '
                })?;
                Some(name(header[own..].trim_start()))
            }
            ("", Some(_)) | (_, None) => None,
            (of, Some((what, own))) => {
                what.ends_with(of).then(|| name(own.trim_start_matches('&')))
            }
        }
    };
    let mut futures = 0;
    for (file, code) in &sources {
        let blocks: Vec<&str> = code.split("\nimpl").skip(1).collect();
        for own in blocks.iter().filter_map(|block| implements(block, " Future")) {
            let public = [
                format!("pub struct {own}<"),
                format!("pub struct {own} "),
                format!("pub struct {own}("),
            ];
            if !public.iter().any(|public| code.contains(public)) {
                continue;
            }
            let waits = blocks.iter().any(|block| {
                let block = &block[..block.find("\n}").unwrap_or(block.len())];
                implements(block, "").as_ref() == Some(&own) && block.contains("pub fn wait(self)")
            });
            assert!(waits, "{file}: {own} is a public future that no thread can wait for");
            futures += 1;
        }
        // A method of a trait for drivers has no `pub`.
        assert!(
            !code.contains("pub async fn"),
            "{file}: an `async fn` has no `wait`: return a `Waitable`"
        );
        for function in code.split("pub fn ").skip(1) {
            let signature = function.split(['{', ';']).next().unwrap_or_default();
            let returns = signature.rsplit_once(") -> ").map_or("", |(_, returns)| returns);
            assert!(
                !returns.starts_with("impl Future"),
                "{file}: {} returns what has no `wait`",
                name(function)
            );
            assert!(
                !returns.starts_with("Pin<Box<"),
                "{file}: {} returns what has no `wait`",
                name(function)
            );
        }
    }
    assert!(futures >= 10, "{futures} public futures are too few: is the search right?");
}

/// Public types that the test below finds and that may be dropped in silence, each with its reason.
const MAY_BE_LEFT: [(&str, &str); 1] = [(
    "cache/mod.rs: RegistrationCache",
    "dropping a handle asks the device to let go of what is idle; registrations keep the rest",
)];

/// Public types whose fields end something when they are dropped.
const ENDS_BY_ITS_PARTS: [&str; 4] = ["Subscription", "Uffd", "RangeSet", "AsyncNotifier"];

#[test]
fn what_must_be_kept_or_awaited_says_so_with_a_reason() {
    let (mut found, mut left) = (0, 0);
    let sources = sources();
    for (file, code) in &sources {
        for (at, _) in code.match_indices("\npub struct ") {
            let name: String =
                code[at + 12..].chars().take_while(|c| c.is_alphanumeric()).collect();
            let implements = |of: &str| {
                let headers = sources
                    .iter()
                    .filter(|(other, _)| other.split('/').next() == file.split('/').next());
                let mut headers = headers
                    .flat_map(|(_, code)| code.split("\nimpl").skip(1))
                    .map(|block| block.split('{').next().unwrap_or_default().to_owned());
                headers.any(|header| {
                    let own = header
                        .split_once(&format!("{of} for "))
                        .map(|(_, own)| own.trim_start_matches('&'));
                    own.is_some_and(|own| {
                        own.starts_with(&name)
                            && !own[name.len()..].starts_with(char::is_alphanumeric)
                    })
                })
            };
            // `fn setting(mut self, …) -> Self`.
            let own = code
                .split("\nimpl")
                .skip(1)
                .filter(|block| block.trim_start().starts_with(&format!("{name} {{")));
            let is_builder = own
                .into_iter()
                .any(|block| block.contains("(mut self") && name.ends_with("Builder"));
            if !implements("Drop")
                && !implements("Future")
                && !is_builder
                && !ENDS_BY_ITS_PARTS.contains(&name.as_str())
            {
                continue;
            }
            if MAY_BE_LEFT.iter().any(|(one, _)| *one == format!("{file}: {name}")) {
                left += 1;
                continue;
            }
            // The attributes are the lines right above.
            let mut above = code[..at]
                .lines()
                .rev()
                .take_while(|line| line.trim().is_empty() || line.starts_with("#["));
            assert!(
                above.any(|line| line.starts_with("#[must_use = \"")),
                "{file}: {name} is dropped in silence"
            );
            found += 1;
        }
    }
    assert!(found >= 25, "{found} types are too few: is the search right?");
    assert_eq!(left, MAY_BE_LEFT.len(), "an exception that is none any more");
}

/// The files of the cache from the highest to the lowest, as `cache/mod.rs` draws them.
#[test]
fn the_files_of_the_cache_import_only_those_below_them() {
    const ORDER: [&str; 18] = [
        "mod",
        "miss",
        "way",
        "core",
        "core/room",
        "life",
        "claim",
        "entry",
        "entry/live",
        "entry/guardian",
        "phase",
        "device",
        "watch",
        "settings",
        "error",
        "turns",
        "task",
        "table",
    ];
    let sources = sources();
    let height = |file: &str| ORDER.iter().position(|known| *known == file);
    let mut seen = 0;
    for (file, code) in sources.iter().filter(|(file, _)| file.starts_with("cache/")) {
        let own = file.trim_start_matches("cache/").trim_end_matches(".rs");
        let own_height =
            height(own).unwrap_or_else(|| panic!("{file} has no place in the cache's map"));
        seen += 1;
        let imported = |from: &str| -> Vec<String> {
            let rest = code.split(from).skip(1);
            rest.map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
                .collect()
        };
        let used = [imported("super::"), imported("crate::cache::")].concat();
        for used in used.into_iter().filter(|used| height(used).is_some() && own != "mod") {
            assert!(
                height(&used) > Some(own_height),
                "{file} imports {used}, which stands above it"
            );
        }
        // Foreign code goes through `foreign`: the device is called in one file, and only there.
        for call in [
            ".register(range)",
            ".deregister(range, handle)",
            ".deregister_lost(range)",
            ".still_valid(range, ",
        ] {
            assert!(!code.contains(call) || own == "device", "{file} calls the device");
        }
        assert!(
            !code.contains("future::Shared"),
            "{file} shares a future in a way that a waker's panic poisons"
        );
        assert!(code.contains("#![forbid(unsafe_code)]"), "{file}");
    }
    assert_eq!(seen, ORDER.len());
    let table =
        &sources.iter().find(|(file, _)| file == "cache/table.rs").expect("it is seen above").1;
    assert!(!table.contains("super::") && !table.contains("Device") && !table.contains("async"));
}

/// Each answer of the tour in `CONTRIBUTING.md` names files, and items that one of them defines.
#[test]
fn the_tour_names_what_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("CONTRIBUTING.md")).unwrap();
    let tour = text.split("## A tour of the code").nth(1).expect("the tour");
    let tour = tour.split("\n## ").next().expect("its end");
    let rows = tour.lines().filter(|line| line.starts_with("| ") && line.contains('?'));
    let mut answers = 0;
    for row in rows {
        let quoted: Vec<_> = row.split('`').skip(1).step_by(2).collect();
        let (files, names): (Vec<&str>, Vec<&str>) =
            quoted.into_iter().partition(|name| name.contains('/'));
        assert!(!files.is_empty(), "an answer without a file: {row}");
        let read = |file: &&str| {
            std::fs::read_to_string(root.join(file))
                .unwrap_or_else(|error| panic!("{file} in {row}: {error}"))
        };
        let code: String = files.iter().map(read).collect();
        for name in names {
            let last = name.rsplit("::").next().unwrap_or_default();
            let is_name = last.chars().all(|c| c.is_alphanumeric() || c == '_');
            let words: Vec<_> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            let kinds = ["fn", "struct", "enum", "trait", "type", "const"];
            let stands = words.windows(2).any(|pair| kinds.contains(&pair[0]) && pair[1] == last);
            // A question may name a word of the language or of the system.
            let is_no_item = ["unsafe", "fork", "munmap", "get", "remove"].contains(&last);
            assert!(!is_name || is_no_item || stands, "{name} is defined in none of {files:?}");
        }
        answers += 1;
    }
    assert!(answers >= 20, "{answers} answers: is the search right?");
}
