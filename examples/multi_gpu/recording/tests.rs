//! The forms in which strace writes, and single lines of each.

mod forms;
mod fuzz;
mod lines;
