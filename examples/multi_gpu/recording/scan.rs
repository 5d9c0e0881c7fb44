//! Arguments and results: where they begin and end, numbers and flags.

use winnow::Result;
use winnow::ascii::{dec_uint, hex_uint, space0};
use winnow::combinator::{alt, delimited, eof, opt, peek, preceded, repeat, terminated};
use winnow::prelude::*;
use winnow::token::{any, one_of, take_till, take_until, take_while};

/// A call's arguments and result.
#[derive(Debug, PartialEq)]
pub(super) struct Parts<'a> {
    pub(super) arguments: Vec<&'a [u8]>,
    pub(super) result: &'a [u8],
}

impl<'a> Parts<'a> {
    /// The argument at this place, or what is wrong.
    pub(super) fn argument(&self, at: usize) -> std::result::Result<&'a [u8], String> {
        self.arguments.get(at).copied().ok_or_else(|| format!("argument {} is missing", at + 1))
    }

    pub(super) fn number(&self, at: usize) -> std::result::Result<u64, String> {
        let text = self.argument(at)?;
        number(text).ok_or_else(|| {
            format!("argument {}, {:?}, is no number", at + 1, text.escape_ascii().to_string())
        })
    }

    /// 32-bit processes have addresses of 32 bits; old versions of strace extend their sign.
    pub(super) fn address(&self, at: usize) -> std::result::Result<u64, String> {
        self.number(at).map(address)
    }

    pub(super) fn result_address(&self) -> std::result::Result<u64, String> {
        let wrong =
            || format!("the result {:?} is no address", self.result.escape_ascii().to_string());
        number(self.result).map(address).ok_or_else(wrong)
    }

    pub(super) fn flags(
        &self,
        at: usize,
        known: &[(&str, u64)],
    ) -> std::result::Result<u64, String> {
        flags(self.argument(at)?, known)
    }
}

/// No user address of 64 bits is so high.
fn address(number: u64) -> u64 {
    if number >= 0xffff_ffff_8000_0000 { number & 0xffff_ffff } else { number }
}

/// Splits what stands behind the opening bracket of a call, if it is complete.
pub(super) fn parts(text: &[u8]) -> Option<Parts<'_>> {
    let (mut arguments, mut depth, mut from, mut rest) = (Vec::new(), 0usize, 0, text);
    // No path can begin behind the last bracket that ends one.
    let paths = text.iter().rposition(|byte| *byte == b'>').unwrap_or(0);
    loop {
        let at = text.len() - rest.len();
        let before = at.checked_sub(1).and_then(|at| text.get(at)).copied();
        let byte = *rest.first()?;
        match byte {
            b'"' => drop(quoted(&mut rest).ok()?),
            b'/' if rest.starts_with(b"/*") => drop(comment(&mut rest).ok()?),
            b'<' if at < paths
                && before.is_some_and(|byte| byte.is_ascii_alphanumeric())
                && opt(path).parse_next(&mut rest).is_ok_and(|path| path.is_some()) => {}
            b'(' | b'[' | b'{' => (depth, rest) = (depth + 1, &rest[1..]),
            b')' if depth == 0 => break,
            b')' | b']' | b'}' => (depth, rest) = (depth.saturating_sub(1), &rest[1..]),
            b',' if depth == 0 => {
                arguments.push(text[from..at].trim_ascii());
                from = at + 1;
                rest = &rest[1..];
            }
            _ => rest = &rest[1..],
        }
    }
    let last = text[from..text.len() - rest.len()].trim_ascii();
    if !last.is_empty() || !arguments.is_empty() {
        arguments.push(last);
    }
    let result =
        preceded((')', space0, '=', space0), winnow::token::rest::<_, winnow::error::ContextError>);
    let result: &[u8] = { result }.parse_next(&mut rest).ok()?;
    (!result.is_empty()).then(|| Parts { arguments, result: result.trim_ascii() })
}

/// How long what is quoted here, or a comment, or a path, is; 1 for a single slash.
pub(super) fn skip(text: &[u8]) -> Option<usize> {
    let mut rest = text;
    let found = match text {
        [b'"', ..] => quoted(&mut rest),
        [b'/', b'*', ..] => comment(&mut rest),
        [b'<', ..] => path(&mut rest),
        _ => return Some(1),
    };
    found.ok().map(|_| text.len() - rest.len())
}

fn quoted<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let inside = repeat::<_, _, (), _, _>(
        0..,
        alt((take_till(1.., ['"', '\\']).void(), ('\\', any).void())),
    );
    delimited('"', inside.take(), '"').parse_next(rest)
}

fn comment<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    delimited("/*", take_until(0.., "*/"), "*/").parse_next(rest)
}

/// What a descriptor stands for (`-y`): `3</etc/ld.so.cache>`. `21<<MAP_HUGE_SHIFT` is a shift.
fn path<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    delimited(('<', peek(one_of(|byte: u8| byte != b'<'))), take_till(0.., b'>'), '>')
        .parse_next(rest)
}

/// A number, with what may follow it: a comment, what it stands for, more words of a result.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let mut text = text;
    let value = alt((
        preceded("0x", hex_number),
        "NULL".value(0),
        dec_uint::<_, u64, winnow::error::ContextError>,
    ));
    terminated(value, alt((eof.void(), one_of(b" </").void()))).parse_next(&mut text).ok()
}

fn hex_number(text: &mut &[u8]) -> Result<u64> {
    hex_uint.parse_next(text)
}

/// Flags as names, as numbers, or both. A name that is not known is an error: what it does is not
/// known either.
pub(super) fn flags(text: &[u8], known: &[(&str, u64)]) -> std::result::Result<u64, String> {
    let wrong = |flag: &[u8]| {
        format!("{:?} is no flag that is known here", flag.escape_ascii().to_string())
    };
    // `0x3 /* PROT_READ|PROT_WRITE */`: the number is enough.
    let text = text.split(|byte| *byte == b'/').next().unwrap_or_default().trim_ascii();
    text.split(|byte| *byte == b'|').try_fold(0, |all, flag| {
        let flag = flag.trim_ascii();
        if let Some((_, bits)) = known.iter().find(|(name, _)| name.as_bytes() == flag) {
            return Ok(all | bits);
        }
        match number(flag) {
            // The size of huge pages.
            _ if shift.parse(flag).is_ok() => Ok(all),
            Some(bits) => Ok(all | bits),
            None => Err(wrong(flag)),
        }
    })
}

fn shift(text: &mut &[u8]) -> Result<()> {
    let word = take_while(1.., |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_');
    (dec_uint::<_, u64, _>, "<<", word, opt(eof)).void().parse_next(text)
}

/// The members of `[a, b, c]`. What strace left out (`...`) is not among them.
pub(super) fn list(text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let inside = text.strip_prefix(b"[")?.strip_suffix(b"]")?;
    // The same commas as between arguments.
    let call = [inside, b") = 0"].concat();
    let members = parts(&call)?.arguments;
    Some(members.into_iter().filter(|member| *member != b"...").map(<[u8]>::to_vec).collect())
}
