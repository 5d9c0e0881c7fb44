//! What is compared with: 64 bytes to each of k processes and back, over plain TCP.

use crate::processes::Process;
use anyhow::Result;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const BYTES: usize = 64;

/// Sends back what comes.
pub(crate) fn echo() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", listener.local_addr()?.port());
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut bytes = [0; BYTES];
    loop {
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
    }
}

pub(crate) struct Fanout {
    peers: Vec<(Process, TcpStream)>,
}

impl Fanout {
    pub(crate) fn begin(peers: u64) -> Result<Self> {
        let peer = |_| {
            let mut process = Process::begin(&["echo".to_owned()])?;
            let port: u16 = process.says("port")?.parse()?;
            let stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_nodelay(true)?;
            Ok((process, stream))
        };
        Ok(Self { peers: (0..peers).map(peer).collect::<Result<_>>()? })
    }

    /// To all, then from all.
    pub(crate) fn round(&mut self) -> Result<Duration> {
        let (began, mut bytes) = (Instant::now(), [0; BYTES]);
        for (_, stream) in &mut self.peers {
            stream.write_all(&bytes)?;
        }
        for (_, stream) in &mut self.peers {
            stream.read_exact(&mut bytes)?;
        }
        Ok(began.elapsed())
    }
}
