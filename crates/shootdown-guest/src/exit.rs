//! The job `vfio-exit`: a process is killed while a device reads into its memory, and another
//! process gets that memory.
#![forbid(unsafe_code)]

use crate::in_flight::{DATA, PATIENCE, QUEUES, Reads, bind, place};
use crate::pattern;
use crate::system::{Options, Pages, Result, report};
use crate::vfio::Group;
use crate::virtio::Block;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Number of bytes that the neighbour takes at once.
const BITE: usize = 2 << 20;

pub(crate) fn run(options: &Options) -> Result<()> {
    let reads = Reads::new(options)?;
    let (mib, watch): (usize, u64) =
        (options.get("neighbour_mib", 160)?, options.get("watch_ms", 500)?);
    let (addresses, group) = bind(1)?;
    for round in 0..reads.rounds {
        let (mut neighbour, mut said) =
            start(&["neighbour".to_owned(), mib.to_string(), watch.to_string()])?;
        line(&mut said)?;
        let arguments = [
            addresses[0].clone(),
            group.to_string(),
            reads.bytes.to_string(),
            reads.seed.to_string(),
        ];
        let times = [round.to_string(), reads.delay.as_millis().to_string()];
        let (mut reader, mut read) =
            start(&[vec!["reader".to_owned()], arguments.into(), times.into()].concat())?;
        let (found, at) = (line(&mut read)?, line(&mut read));
        let begun = Instant::now();
        at?;
        reader.kill()?;
        // The memory may be free at once, and the neighbour is ready to take it.
        neighbour.stdin.take().ok_or("no input of the neighbour's")?.write_all(b"!")?;
        reader.wait()?;
        let exit = begun.elapsed();
        let mut rest = String::new();
        said.read_to_string(&mut rest)?;
        let ended = neighbour.wait()?;
        let [wrong, read_us, early] = numbers(&found)?;
        // A neighbour without a last line has crashed.
        let changed =
            numbers::<1>(&rest).map_or("null".to_owned(), |[changed]| changed.to_string());
        report(&format!(
            r#"{{"job":"vfio-exit","round":{round},"wrong":{wrong},"read_us":{read_us},"ended_before":{early},"exit_us":{},"changed":{changed},"crashed":{},"neighbour":"{ended}"}}"#,
            exit.as_micros(),
            !ended.success(),
        ));
    }
    Ok(())
}

/// Starts another process of this program.
fn start(arguments: &[String]) -> Result<(Child, BufReader<ChildStdout>)> {
    let streams = || Stdio::piped();
    let mut child = Command::new("/proc/self/exe")
        .args(arguments)
        .stdin(streams())
        .stdout(streams())
        .spawn()?;
    let said = child.stdout.take().ok_or("no output of a process")?;
    Ok((child, BufReader::new(said)))
}

fn line(said: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = String::new();
    match said.read_line(&mut line)? {
        0 => Err("a process has ended without its line".into()),
        _ => Ok(line),
    }
}

fn numbers<const N: usize>(text: &str) -> Result<[u64; N]> {
    let numbers: Vec<u64> =
        text.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?;
    numbers.try_into().map_err(|_| format!("{N} numbers were to come, and it was {text:?}").into())
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{text}").and_then(|()| out.flush())?)
}

/// The process that is killed. One read runs to its end, which shows that the device works; another
/// one is in flight.
pub(crate) fn reader(arguments: &[String]) -> Result<()> {
    let [address, rest @ ..] = arguments else { return Err("a reader has arguments".into()) };
    let [group, bytes, seed, round, delay] = numbers(&rest.join(" "))?;
    let (bytes, seed) = (bytes as usize, seed as u16);
    let group = Group::open(group as u32)?;
    let mut device = Block::new(&group, address, QUEUES)?;
    let data = Pages::new(bytes)?;
    data.fill_own();
    group.map(&data, DATA)?;
    device.start()?;
    let (first, second) = (place(2 * round, &device, bytes), place(2 * round + 1, &device, bytes));
    let begun = Instant::now();
    device.begin(first, DATA, bytes)?;
    let status = device.finish(PATIENCE)?;
    let took = begun.elapsed();
    if status != 0 {
        return Err(format!("a read has failed: {status}").into());
    }
    let wrong = pattern::wrong(&data.copy(), seed, 0, first);
    device.begin(second, DATA, bytes)?;
    thread::sleep(Duration::from_millis(delay));
    say(&format!("{wrong} {} {}", took.as_micros(), u8::from(device.ended())))?;
    say("in flight")?;
    loop {
        thread::park();
    }
}

/// The process that takes memory, fills it, and checks that it stays unchanged.
pub(crate) fn neighbour(arguments: &[String]) -> Result<()> {
    let [mib, watch] = numbers(&arguments.join(" "))?;
    say("ready")?;
    std::io::stdin().read_exact(&mut [0])?;
    let begun = Instant::now();
    let mut all = Vec::new();
    while all.len() * BITE < (mib as usize) << 20 {
        let pages = Pages::new(BITE)?;
        pages.fill_own();
        all.push(pages);
    }
    if let Some(rest) = Duration::from_millis(watch).checked_sub(begun.elapsed()) {
        thread::sleep(rest);
    }
    say(&all.iter().map(Pages::foreign).sum::<u64>().to_string())
}
