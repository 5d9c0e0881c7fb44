//! What can go wrong.
#![forbid(unsafe_code)]

use ash::vk;
use std::error::Error;
use std::fmt;

#[derive(Debug)]
pub enum Problem {
    /// What is needed is not there: no loader, no driver, no userfaultfd.
    Missing(String),
    /// An option that this machine cannot fulfil.
    Options(String),
    Vulkan(vk::Result),
    Other(Box<dyn Error + Send + Sync>),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(what) | Self::Options(what) => f.write_str(what),
            Self::Vulkan(error) => write!(f, "Vulkan: {error:?}"),
            Self::Other(error) => error.fmt(f),
        }
    }
}

impl Error for Problem {}

impl From<vk::Result> for Problem {
    fn from(error: vk::Result) -> Self {
        Self::Vulkan(error)
    }
}

impl Problem {
    pub fn other(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }
}

impl From<std::io::Error> for Problem {
    fn from(error: std::io::Error) -> Self {
        Self::other(error)
    }
}
