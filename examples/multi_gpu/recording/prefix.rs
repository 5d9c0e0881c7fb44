//! What stands before a call: process id, time, instruction pointer.
//!
//! Which of them there are depends on strace's options. Every line is looked at by itself.

use winnow::Result;
use winnow::ascii::{digit1, space0, space1};
use winnow::combinator::{alt, delimited, not, opt, preceded, terminated};
use winnow::prelude::*;
use winnow::token::{one_of, take_till, take_until, take_while};

/// Linux gives no task a higher number.
const MOST_PID: u32 = 1 << 22;
const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 24 * 3600 * SECOND;

/// What stands before a call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Prefix {
    pub(super) pid: Option<u32>,
    /// The process id stands alone at the beginning, as in a file (`-f -o FILE`). On a terminal it
    /// is `[pid 7]`.
    pub(super) plain: bool,
    pub(super) time: Option<Stamp>,
}

/// A time as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stamp {
    /// `-t`, `-tt`: ns of the day.
    OfDay(u64),
    /// `-ttt`: ns; or `-r`: ns since the line before, which has spaces before it (`padded`).
    Seconds { ns: u64, padded: bool },
}

/// Takes the prefix off a line.
pub(super) fn prefix(line: &mut &[u8]) -> Prefix {
    let mut found = Prefix::default();
    let bracketed =
        opt(delimited((space0, "[pid", space1), pid, "] ")).parse_next(line).unwrap_or_default();
    found.pid = bracketed;
    if bracketed.is_none() {
        let before = *line;
        if let Ok(pid) = plain_pid(line) {
            (found.pid, found.plain) = (Some(pid), true);
            // strace fills the column up to five digits.
            let digits = before.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let named = before.get(digits) == Some(&b'<');
            if let Ok(fill) =
                spaces(5usize.saturating_sub(digits) * usize::from(!named)).parse_next(line)
            {
                let _: &[u8] = fill;
            }
        }
    }
    loop {
        let checkpoint = *line;
        let whole = padded_seconds(line);
        let padded = space0::<_, winnow::error::ContextError>
            .parse_next(line)
            .is_ok_and(|spaces: &[u8]| !spaces.is_empty());
        if found.time.is_none()
            && let Ok(time) = time(line, whole)
        {
            found.time = Some(match time {
                Stamp::Seconds { ns, .. } => Stamp::Seconds { ns, padded },
                of_day => of_day,
            });
        } else if !opt(bracket).parse_next(line).is_ok_and(|bracket| bracket.is_some()) {
            if found == Prefix::default() {
                *line = checkpoint;
            }
            return found;
        }
    }
}

fn spaces<'a>(most: usize) -> impl FnMut(&mut &'a [u8]) -> Result<&'a [u8]> {
    move |line| take_while(0..=most, b' ').parse_next(line)
}

/// `7`, `7<comm>`
fn pid(line: &mut &[u8]) -> Result<u32> {
    let number = digit1.parse_to::<u32>().verify(|pid| (1..=MOST_PID).contains(pid));
    terminated(number, opt(comm)).parse_next(line)
}

/// The name of a task (`--decode-pids=comm`): to the last `>` before a space or bracket.
fn comm<'a>(line: &mut &'a [u8]) -> Result<&'a [u8]> {
    delimited('<', take_till(1..=64, b'>'), '>').parse_next(line)
}

fn plain_pid(line: &mut &[u8]) -> Result<u32> {
    let checkpoint = *line;
    let found = if padded_seconds(line) {
        Err(winnow::error::ContextError::new())
    } else {
        delimited(space0, pid, ' ').parse_next(line)
    };
    if found.is_err() {
        *line = checkpoint;
    }
    found
}

/// `     0 ` (`-r` in whole seconds): six columns, filled from the left. Process ids are filled
/// from the right.
fn padded_seconds(line: &[u8]) -> bool {
    let spaces = line.iter().take_while(|byte| **byte == b' ').count();
    let digits = line[spaces..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    spaces > 0 && digits > 0 && spaces + digits == 6 && line.get(6) == Some(&b' ')
}

/// `[00007fc71dfcfad7] ` (`-i`), `[  59] ` (`-n`), a security context.
fn bracket<'a>(line: &mut &'a [u8]) -> Result<&'a [u8]> {
    preceded(not(alt(("[ Process", "[pid "))), delimited('[', take_till(1..=256, b']'), "] "))
        .parse_next(line)
}

fn time(line: &mut &[u8], whole: bool) -> Result<Stamp> {
    let checkpoint = *line;
    let seconds = |line: &mut &[u8]| seconds(line, whole);
    let found = terminated(
        alt((of_day, seconds)),
        (' ', opt((space0, "(+", take_until(0..=32, ")"), ")", space1))),
    )
    .parse_next(line);
    if found.is_err() {
        *line = checkpoint;
    }
    found
}

fn of_day(line: &mut &[u8]) -> Result<Stamp> {
    let two = |line: &mut &[u8]| {
        take_while(2..=2, |byte: u8| byte.is_ascii_digit()).parse_to::<u64>().parse_next(line)
    };
    let (hours, _, minutes, _, seconds, ns) =
        (two, ':', two, ':', two, opt(fraction)).parse_next(line)?;
    Ok(Stamp::OfDay(((hours * 60 + minutes) * 60 + seconds) * SECOND + ns.unwrap_or(0)))
}

fn seconds(line: &mut &[u8], padded: bool) -> Result<Stamp> {
    let (digits, ns): (&[u8], _) = (digit1, opt(fraction)).parse_next(line)?;
    // Without a fraction it is a time only if it is too long for anything else, or in its column.
    let whole = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<u64>().ok());
    let whole = whole
        .filter(|_| ns.is_some() || padded || digits.len() >= 9)
        .and_then(|whole| whole.checked_mul(SECOND));
    let ns = whole.and_then(|whole| whole.checked_add(ns.unwrap_or(0)));
    ns.map(|ns| Stamp::Seconds { ns, padded: false }).ok_or_else(winnow::error::ContextError::new)
}

/// `.123456`, as ns.
fn fraction(line: &mut &[u8]) -> Result<u64> {
    let digits: &[u8] = preceded(one_of('.'), take_while(1..=9, |byte: u8| byte.is_ascii_digit()))
        .parse_next(line)?;
    let value = digits.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0'));
    Ok(value * 10u64.pow(9 - digits.len() as u32))
}

/// Makes one clock of the times of a file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clock {
    /// The first time, where it is one of a clock.
    first: Option<Stamp>,
    relative: bool,
    /// Days, where the time of day went back to 0.
    days: u64,
    last: u64,
}

impl Clock {
    /// ns since the first line.
    pub(super) fn at(&mut self, stamp: Option<Stamp>) -> u64 {
        let Some(stamp) = stamp else { return self.last };
        let Some(first) = self.first else {
            // `-r` begins with 0, or has the number in a column of its own.
            self.relative = matches!(stamp, Stamp::Seconds { ns, padded } if padded || ns < SECOND);
            self.first = Some(stamp);
            return 0;
        };
        self.last = match (stamp, first) {
            (Stamp::Seconds { ns, .. }, _) if self.relative => self.last.saturating_add(ns),
            (Stamp::Seconds { ns, .. }, Stamp::Seconds { ns: first, .. })
                if ns < first && ns < 100_000 * SECOND =>
            {
                // A clock does not go back so far: these are differences after all.
                self.relative = true;
                self.last.saturating_add(ns)
            }
            (Stamp::Seconds { ns, .. }, Stamp::Seconds { ns: first, .. }) => {
                ns.saturating_sub(first)
            }
            (Stamp::OfDay(ns), Stamp::OfDay(first)) => {
                let now = |days: u64| days.saturating_mul(DAY).saturating_add(ns);
                // After midnight.
                if now(self.days).saturating_add(DAY / 2) < first.saturating_add(self.last) {
                    self.days += 1;
                }
                now(self.days).saturating_sub(first)
            }
            // Two kinds of time in one file: the clock stands still.
            _ => self.last,
        };
        self.last
    }

    /// When the first line was, in ns of a clock that the files of one run share.
    pub(super) fn origin(&self) -> Option<u64> {
        match self.first? {
            _ if self.relative => None,
            Stamp::OfDay(ns) | Stamp::Seconds { ns, .. } => Some(ns),
        }
    }
}
