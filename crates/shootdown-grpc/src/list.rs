//! The connections of each certificate.
#![forbid(unsafe_code)]

use crate::name::{Name, Shown};
use crate::observe::{Count, Tally};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

type OfName = HashMap<Arc<[Name]>, VecDeque<(u64, CancellationToken)>>;

/// The connections of each name in certificates, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct List(Arc<Mutex<(u64, OfName)>>);

impl List {
    pub(crate) fn enter(
        &self,
        shown: &Shown,
        cut: &CancellationToken,
        most: usize,
        tally: &Tally,
    ) -> Listed {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.0 += 1;
        let number = list.0;
        let of_name = list.1.entry(shown.names.clone()).or_default();
        of_name.push_back((number, cut.clone()));
        let oldest = if of_name.len() > most.max(1) { of_name.pop_front() } else { None };
        drop(list);
        if let (Some((_, oldest)), Some(name)) = (oldest, shown.names.first()) {
            tally.refuse(
                Count::Full,
                name,
                "as many connections as one name may have: the oldest is cut",
            );
            oldest.cancel();
        }
        Listed { list: self.clone(), names: shown.names.clone(), number }
    }
}

/// A connection on the list. Its drop removes it.
#[derive(Debug)]
pub(crate) struct Listed {
    list: List,
    names: Arc<[Name]>,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut list = self.list.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_name) = list.1.get_mut(&self.names) {
            of_name.retain(|(number, _)| *number != self.number);
            if of_name.is_empty() {
                list.1.remove(&self.names);
            }
        }
    }
}
