//! What a type says of itself, compared by the parts that must stand in it.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses a part of it")]

use std::fmt::{Debug, Display};

/// Each part of `parts` stands in the text, in this order.
#[track_caller]
pub fn expect(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        let Some((_, behind)) = rest.split_once(part) else {
            panic!("{text:?} does not name {part:?}, or not in the order of {parts:?}");
        };
        rest = behind;
    }
}

#[track_caller]
pub fn debug(what: &dyn Debug, parts: &[&str]) {
    expect(&format!("{what:?}"), parts);
}

#[track_caller]
pub fn display(what: &dyn Display, parts: &[&str]) {
    expect(&what.to_string(), parts);
}
