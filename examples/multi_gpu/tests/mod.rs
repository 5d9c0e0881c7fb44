//! Recordings and memory: the forms in which strace writes, single lines of each, any input, and
//! what Linux does.

mod forms;
mod fuzz;
mod lines;
mod linux;
mod memory;
mod schedule;
