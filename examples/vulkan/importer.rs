//! What a registration cache registers with: an import of the memory.
#![forbid(unsafe_code)]

use crate::gpu::{Gpu, Import};
use crate::memory::Files;
use crate::options::Fault;
use crate::problem::Problem;
use shootdown::AddressRange;
use shootdown::cache::{Device, StillRegistered};
use shootdown::source::OwnedMapping;
use std::sync::{Arc, Mutex, PoisonError};

/// Imports for a device, and frees when the device is done.
pub struct Importer {
    pub gpu: Arc<Gpu>,
    /// Import a second mapping of the same pages.
    files: Option<Files>,
    fault: Option<Fault>,
    /// What a planted bug has let go of too early: it is freed when it is safe.
    early: Mutex<Vec<Imported>>,
}

/// An import, which is dropped before what it is of.
pub struct Imported {
    pub import: Import,
    _second: Option<OwnedMapping>,
}

impl Importer {
    pub fn new(gpu: &Arc<Gpu>, files: Option<Files>, fault: Option<Fault>) -> Self {
        Self { gpu: gpu.clone(), files, fault, early: Mutex::default() }
    }

    pub fn import(&self, range: AddressRange) -> Result<Imported, Problem> {
        let second = self.files.as_ref().map(|files| files.second(range)).transpose()?;
        let import = self.gpu.import(second.as_ref().map_or(range, OwnedMapping::range), 1)?;
        Ok(Imported { import, _second: second })
    }
}

impl Device for Importer {
    type Handle = Imported;
    type Error = Problem;

    async fn register(&self, range: AddressRange) -> Result<Imported, Problem> {
        self.import(range)
    }

    async fn deregister(
        &self,
        _range: AddressRange,
        imported: Imported,
    ) -> Result<(), StillRegistered<Imported, Problem>> {
        if self.fault == Some(Fault::SkipWait) {
            self.early.lock().unwrap_or_else(PoisonError::into_inner).push(imported);
            return Ok(());
        }
        // The work in flight first; then it is freed.
        self.gpu.done().reached(imported.import.last_job()).await;
        Ok(())
    }
}
