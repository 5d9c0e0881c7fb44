//! What the documentation promises of itself: its code fits the page of docs.rs, and its links to
//! the contract lead somewhere.
#![cfg(not(any(loom, shuttle, miri)))]
#![allow(missing_docs)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Columns of a block of code that docs.rs shows without a scroll bar.
const COLUMNS: usize = 80;

/// A line of a document: its place, and its text without the marker of the comment.
struct Line {
    place: String,
    text: String,
}

fn files_below(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// All documents, each as a list of its lines. A doc comment is a document of its own.
fn documents() -> Vec<Vec<Line>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md"), root.join("CONTRACT.md")];
    files_below(&root.join("src"), &mut files);
    files.sort();
    let mut documents = Vec::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let is_code = match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => true,
            Some("md") => false,
            _ => continue,
        };
        let text = std::fs::read_to_string(&path).unwrap();
        let mut document = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let code = line.trim_start();
            let text = match (is_code, code.strip_prefix("///").or(code.strip_prefix("//!"))) {
                (false, _) => line,
                (true, Some(text)) => text.strip_prefix(' ').unwrap_or(text),
                (true, None) => {
                    documents.push(std::mem::take(&mut document));
                    continue;
                }
            };
            document.push(Line { place: format!("{name}:{}", number + 1), text: text.to_owned() });
        }
        documents.push(document);
    }
    documents.retain(|document| !document.is_empty());
    documents
}

/// Tells whether the language of a block is one that rustdoc compiles, so that `# ` hides a line.
fn is_rust(language: &str) -> bool {
    language.split(',').all(|word| {
        matches!(word, "" | "rust" | "no_run" | "ignore" | "should_panic" | "compile_fail")
    })
}

#[test]
fn code_in_documents_fits_the_page() {
    let (mut looked_at, mut wide) = (0, Vec::new());
    for document in documents() {
        let mut language: Option<String> = None;
        for Line { place, text } in &document {
            if let Some(fence) = text.trim_start().strip_prefix("```") {
                language = if language.is_some() { None } else { Some(fence.trim().to_owned()) };
                continue;
            }
            let Some(language) = &language else { continue };
            let hidden = is_rust(language) && (text == "#" || text.starts_with("# "));
            let columns = text.chars().count();
            looked_at += 1;
            if !hidden && columns > COLUMNS {
                wide.push(format!("{place}: {columns} columns"));
            }
        }
        assert!(language.is_none(), "{}: a block of code is not closed", document[0].place);
    }
    assert!(looked_at > 500, "{looked_at} lines of code are too few: is the search right?");
    assert!(wide.is_empty(), "more than {COLUMNS} columns of code:\n{}", wide.join("\n"));
}

/// The id that rustdoc gives a heading.
fn id_of(heading: &str) -> String {
    let kept = heading.chars().filter_map(|character| match character {
        ' ' => Some('-'),
        '-' | '_' => Some(character),
        _ if character.is_alphanumeric() => Some(character.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

#[test]
fn links_to_the_contract_lead_to_the_section_of_their_rule() {
    const PAGE: &str = "crate::docs::contract#";
    let contract = include_str!("../CONTRACT.md");
    let sections: BTreeSet<String> =
        contract.lines().filter_map(|line| line.strip_prefix("## ")).map(id_of).collect();
    let (mut followed, mut wrong) = (0, Vec::new());
    for Line { place, text } in documents().iter().flatten() {
        for (at, _) in text.match_indices(PAGE) {
            let rest = &text[at + PAGE.len()..];
            let id = rest.split(|c: char| !(c.is_alphanumeric() || c == '-')).next().unwrap();
            // `[C6]: page#c-...` or `[C6](page#c-...)`.
            let tag = text[..at].rsplit('[').next().unwrap().split(']').next().unwrap();
            let letter = tag.trim_matches('`').chars().next().unwrap_or(' ').to_ascii_lowercase();
            followed += 1;
            if !sections.contains(id) || !id.starts_with(&format!("{letter}-")) {
                wrong.push(format!("{place}: {tag} leads to {id}"));
            }
        }
    }
    assert!(followed > 50, "{followed} links are too few: is the search right?");
    assert!(wrong.is_empty(), "the contract has no such section:\n{}", wrong.join("\n"));
}
