//! Uploads without a copy, from memory that is replaced meanwhile: what arrives through three
//! caches of imports.
#![forbid(unsafe_code)]

use crate::gpu::Gpu;
use crate::importer::{Imported, Importer};
use crate::memory::{Buffers, Files, Flight, Owned, Raw, Steps};
use crate::options::{Fault, Options};
use crate::problem::Problem;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use shootdown::cache::RegistrationCache;
use shootdown::source::Uffd;
use shootdown::{AddressRange, AddressSpace};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Who knows what is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    Plain,
    Uffd,
    Owned,
}

impl Cache {
    pub const ALL: [Self; 3] = [Self::Plain, Self::Uffd, Self::Owned];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Uffd => "Uffd",
            Self::Owned => "OwnedMapping",
        }
    }
}

/// What is to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    /// The library promises that nothing is wrong.
    Right,
    /// Without it something is.
    Wrong,
    /// Neither.
    Open,
}

#[derive(Serialize)]
pub struct Row {
    pub cache: Cache,
    pub in_flight: bool,
    pub uploads: u32,
    pub replaced: u32,
    pub imports: u64,
    /// Uploads of which something else arrived than what the program had written when it submitted
    /// them.
    pub wrong: u32,
    pub wrong_words: u64,
    /// Replacements after which the job in flight was not done: `OwnedMapping` promises that it is.
    pub unfinished: u32,
    pub expected: Expected,
}

#[derive(Serialize)]
pub struct Uploads {
    pub bytes: usize,
    pub buffers: usize,
    pub replace_one_in: u32,
    /// Whether imports were of a second mapping (`--pages`).
    pub pages: bool,
    /// Whether an import keeps the pages that were at its address, or reads what is there.
    pub keeps_pages: bool,
    pub max_registrations: usize,
    pub rows: Vec<Row>,
    /// An import and its end, and a look-up of one that is kept, in ns.
    pub import_ns: f64,
    pub plain_hit_ns: f64,
    pub hit_ns: f64,
}

impl Uploads {
    pub fn row(&self, cache: Cache, in_flight: bool) -> Option<&Row> {
        self.rows.iter().find(|row| row.cache == cache && row.in_flight == in_flight)
    }

    /// What is not as expected.
    pub fn failures(&self) -> Vec<String> {
        let judge = |row: &Row| {
            let (name, kind) = (row.cache.name(), if row.in_flight { "in flight" } else { "idle" });
            match row.expected {
                Expected::Right if row.wrong > 0 => {
                    Some(format!("{name}, {kind}: {} uploads were wrong", row.wrong))
                }
                Expected::Wrong if row.wrong == 0 => Some(format!(
                    "{name}, {kind}: no upload was wrong, so nothing was shown: try more --uploads or a smaller --replace-one-in"
                )),
                _ => None,
            }
        };
        let early = |row: &Row| {
            (row.cache == Cache::Owned && row.unfinished > 0).then(|| {
                format!(
                    "OwnedMapping, in flight: {} changes returned before the job was done",
                    row.unfinished
                )
            })
        };
        self.rows.iter().flat_map(|row| judge(row).into_iter().chain(early(row))).collect()
    }
}

/// What is in a buffer: every word of every version is another one.
fn pattern(version: u64, bytes: &mut [u8]) {
    let mut word = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(version | 1);
        chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
    }
}

/// So many buffers, or as many as the device imports at a time.
const DEFAULT_BUFFERS: usize = 64;

struct Stage<'a> {
    options: &'a Options,
    gpu: Arc<Gpu>,
    len: usize,
    files: Option<Files>,
    /// The last gate that was given to a job, and the last version of a buffer.
    gates: AtomicU64,
    versions: AtomicU64,
}

fn next(of: &AtomicU64) -> u64 {
    of.fetch_add(1, Ordering::Relaxed) + 1
}

/// A job in flight while its memory is replaced; 0 if there is none.
struct Job<'a> {
    gpu: &'a Gpu,
    number: u64,
    gate: u64,
    unfinished: u32,
}

impl Steps for Job<'_> {
    fn release(&mut self) -> Result<(), Problem> {
        self.gpu.open_gate(self.gate)
    }

    fn changed(&mut self) {
        self.unfinished += u32::from(self.gpu.done().value() < self.number);
    }
}

impl Stage<'_> {
    fn raw(&self, count: usize) -> Result<Raw, Problem> {
        Raw::map(
            count,
            self.len,
            self.gpu.card.alignment.max(rustix::param::page_size() as u64) as usize,
            self.files.clone(),
        )
    }

    fn count(&self) -> usize {
        self.options
            .buffers
            .map_or_else(|| DEFAULT_BUFFERS.min(self.max_registrations()), usize::from)
    }

    fn importer(&self) -> Importer {
        Importer::new(&self.gpu, self.files.clone(), self.options.fault)
    }

    /// Uploads; `upload` submits one of a range that goes on when the gate is open, and returns its
    /// number.
    fn run(
        &self,
        cache: Cache,
        flight: Flight,
        buffers: &mut dyn Buffers,
        upload: &mut dyn FnMut(AddressRange, u64) -> Result<u64, Problem>,
    ) -> Result<Row, Problem> {
        let mut random = StdRng::seed_from_u64(self.options.seed);
        let (mut now, mut expected, mut got) = (Vec::new(), vec![0; self.len], vec![0; self.len]);
        let mut bytes = vec![0; self.len];
        for buffer in 0..self.count() {
            now.push(next(&self.versions));
            pattern(now[buffer], &mut bytes);
            buffers.write(buffer, &bytes);
        }
        let in_flight = flight == Flight::InFlight;
        let mut row = Row {
            cache,
            in_flight,
            uploads: self.options.uploads,
            replaced: 0,
            imports: 0,
            wrong: 0,
            wrong_words: 0,
            unfinished: 0,
            expected: Expected::Open,
        };
        for _ in 0..self.options.uploads {
            let buffer = random.random_range(0..self.count());
            let replaced =
                random.random_ratio(1, self.options.replace_one_in).then(|| next(&self.versions));
            if let Some(version) = replaced {
                pattern(version, &mut bytes);
                row.replaced += 1;
            }
            let mut replace = |buffers: &mut dyn Buffers, number, gate| {
                let mut job = Job { gpu: &self.gpu, number, gate, unfinished: 0 };
                match replaced {
                    Some(_) => buffers.replace(buffer, &bytes, flight, &mut job)?,
                    None => job.release()?,
                }
                row.unfinished += job.unfinished;
                Ok::<_, Problem>(())
            };
            // What is there when it is submitted.
            let version = replaced.filter(|_| !in_flight).unwrap_or(now[buffer]);
            let job = if in_flight {
                let gate = next(&self.gates);
                let job = upload(buffers.range(buffer), gate)?;
                replace(buffers, job, gate)?;
                job
            } else {
                replace(buffers, 0, 0)?;
                upload(buffers.range(buffer), 0)?
            };
            now[buffer] = replaced.unwrap_or(now[buffer]);
            self.gpu.done().reached(job).wait();
            self.gpu.arrived(&mut got)?;
            pattern(version, &mut expected);
            if got != expected {
                row.wrong += 1;
                row.wrong_words += got
                    .chunks(8)
                    .zip(expected.chunks(8))
                    .filter(|(got, expected)| got != expected)
                    .count() as u64;
            }
        }
        Ok(row)
    }

    fn plain(&self, flight: Flight) -> Result<Row, Problem> {
        let (importer, mut buffers) = (self.importer(), self.raw(self.count())?);
        let mut known: HashMap<u64, Imported> = HashMap::new();
        let mut row = self.run(Cache::Plain, flight, &mut buffers, &mut |range, gate| {
            let imported = match known.entry(range.start()) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(importer.import(range)?)
                }
            };
            self.gpu.upload(&imported.import, gate)
        })?;
        row.imports = known.len() as u64;
        Ok(row)
    }

    fn through(
        &self,
        cache: &RegistrationCache<Importer>,
        range: AddressRange,
        gate: u64,
    ) -> Result<u64, Problem> {
        let registration = cache.get(range).wait().map_err(Problem::other)?;
        // The job is noted in the import, which waits for it; so the registration may go.
        self.gpu.upload(&registration.handle().import, gate)
    }

    fn max_registrations(&self) -> usize {
        // The target is an allocation, too, and what is on its way out counts until it is freed.
        usize::try_from(self.gpu.card.allocations).unwrap_or(usize::MAX).saturating_sub(16).max(1)
    }

    fn cache(&self, space: &AddressSpace, uffd: Option<&Uffd>) -> RegistrationCache<Importer> {
        let builder = RegistrationCache::<Importer>::builder()
            .max_registrations(self.max_registrations())
            .page(self.gpu.card.alignment.max(4096));
        let builder = match uffd {
            Some(uffd) => builder.watch(uffd.clone()),
            None => builder,
        };
        builder.build(space, self.importer())
    }

    /// Runs `work` beside a source of `space` whose threads read and deliver.
    fn beside<T>(
        space: &AddressSpace,
        work: impl FnOnce(&Uffd) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let (uffd, mut reader, mut deliveries) = Uffd::open(space)
            .map_err(|error| Problem::Missing(format!("there is no userfaultfd: {error}")))?;
        let threads = [
            std::thread::spawn(move || reader.run()),
            std::thread::spawn(move || deliveries.run()),
        ];
        let done = work(&uffd);
        uffd.stop();
        for thread in threads {
            thread.join().map_err(|_| Problem::other("a thread of the source has panicked"))??;
        }
        done
    }

    fn watched(&self, flight: Flight) -> Result<Row, Problem> {
        let space = AddressSpace::new();
        Self::beside(&space, |uffd| {
            let cache = self
                .cache(&space, Some(uffd).filter(|_| self.options.fault != Some(Fault::Unwatched)));
            let mut buffers = self.raw(self.count())?;
            let mut row = self.run(Cache::Uffd, flight, &mut buffers, &mut |range, gate| {
                self.through(&cache, range, gate)
            })?;
            cache.flush().wait();
            row.imports = cache.stats().misses;
            Ok(row)
        })
    }

    fn owned(&self, flight: Flight) -> Result<Row, Problem> {
        let space = AddressSpace::new();
        // With the bug its mappings tell another space.
        let told = if self.options.fault == Some(Fault::Unwatched) {
            AddressSpace::new()
        } else {
            space.clone()
        };
        let cache = self.cache(&space, None);
        let mut buffers = Owned::map(
            &told,
            self.count(),
            self.len,
            self.gpu.card.alignment as usize,
            self.files.clone(),
        )?;
        let mut row = self.run(Cache::Owned, flight, &mut buffers, &mut |range, gate| {
            self.through(&cache, range, gate)
        })?;
        cache.flush().wait();
        row.imports = cache.stats().misses;
        Ok(row)
    }

    /// Whether an import has the pages of its memory, or reads what is at the address.
    fn keeps_pages(&self) -> Result<bool, Problem> {
        let (importer, mut buffers) = (self.importer(), self.raw(1)?);
        let (mut old, mut new, mut got) = (vec![0; self.len], vec![0; self.len], vec![0; self.len]);
        pattern(next(&self.versions), &mut old);
        pattern(next(&self.versions), &mut new);
        buffers.write(0, &old);
        let imported = importer.import(buffers.range(0))?;
        buffers.replace(0, &new, Flight::Idle, &mut ())?;
        let job = self.gpu.upload(&imported.import, 0)?;
        self.gpu.done().reached(job).wait();
        self.gpu.arrived(&mut got)?;
        if got != old && got != new {
            let name = &self.gpu.card.name;
            return Err(Problem::other(format!(
                "{name}: neither the old nor the new memory arrives after a replacement"
            )));
        }
        Ok(got == old)
    }

    /// Nanoseconds: an import and its end, a look-up in a map, a look-up in the cache.
    fn costs(&self) -> Result<(f64, f64, f64), Problem> {
        let (importer, mut buffers) = (self.importer(), self.raw(1)?);
        // All of its pages are there.
        buffers.write(0, &vec![1; self.len]);
        let range = buffers.range(0);
        let import = nanoseconds(20, || importer.import(range).map(drop))?;
        let known = HashMap::from([(range.start(), 1)]);
        let plain = nanoseconds(20_000, || {
            std::hint::black_box(known.get(std::hint::black_box(&range.start())));
            Ok(())
        })?;
        let space = AddressSpace::new();
        let hit = Self::beside(&space, |uffd| {
            let cache = self.cache(&space, Some(uffd));
            drop(cache.get(range).wait().map_err(Problem::other)?);
            let hit =
                nanoseconds(20_000, || cache.get(range).wait().map(drop).map_err(Problem::other))?;
            cache.flush().wait();
            Ok(hit)
        })?;
        Ok((import, plain, hit))
    }
}

/// Nanoseconds for each of `times` calls; the median of 9.
fn nanoseconds(times: u32, mut call: impl FnMut() -> Result<(), Problem>) -> Result<f64, Problem> {
    let mut samples = Vec::new();
    for _ in 0..9 {
        let began = Instant::now();
        for _ in 0..times {
            call()?;
        }
        samples.push(began.elapsed().as_nanos() as f64 / f64::from(times));
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[4])
}

/// The size of a buffer in bytes: what the device imports.
pub fn buffer_len(options: &Options, alignment: u64) -> u64 {
    (u64::from(options.kib) * 1024)
        .next_multiple_of(alignment.max(rustix::param::page_size() as u64))
}

pub fn run(options: &Options, gpu: &Arc<Gpu>) -> Result<Uploads, Problem> {
    let len = buffer_len(options, gpu.card.alignment) as usize;
    if options.pages && gpu.card.alignment > rustix::param::page_size() as u64 {
        return Err(Problem::Options(format!(
            "--pages: {} imports no memory that begins at a page, but at {} bytes only",
            gpu.card.name, gpu.card.alignment
        )));
    }
    let files = options.pages.then(Files::default);
    let (gates, versions) = (AtomicU64::new(0), AtomicU64::new(0));
    let stage = Stage { options, gpu: gpu.clone(), len, files, gates, versions };
    if stage.count() > stage.max_registrations() {
        return Err(Problem::Options(format!(
            "--buffers: {} has room for {}",
            gpu.card.name,
            stage.max_registrations()
        )));
    }
    let keeps_pages = stage.keeps_pages()?;
    let mut rows = Vec::new();
    for flight in [Flight::Idle, Flight::InFlight] {
        let in_flight = flight == Flight::InFlight;
        for cache in Cache::ALL {
            let (mut row, expected) = match cache {
                Cache::Plain if in_flight || keeps_pages => (stage.plain(flight)?, Expected::Wrong),
                Cache::Plain => (stage.plain(flight)?, Expected::Open),
                // It hears of a change when the device reads other memory already.
                Cache::Uffd if in_flight && !keeps_pages => {
                    (stage.watched(flight)?, Expected::Open)
                }
                Cache::Uffd => (stage.watched(flight)?, Expected::Right),
                Cache::Owned => (stage.owned(flight)?, Expected::Right),
            };
            row.expected = expected;
            rows.push(row);
        }
    }
    let (import_ns, plain_hit_ns, hit_ns) = stage.costs()?;
    let max_registrations = stage.max_registrations();
    let (buffers, replace_one_in, pages) = (stage.count(), options.replace_one_in, options.pages);
    Ok(Uploads {
        bytes: len,
        buffers,
        replace_one_in,
        pages,
        keeps_pages,
        max_registrations,
        rows,
        import_ns,
        plain_hit_ns,
        hit_ns,
    })
}
