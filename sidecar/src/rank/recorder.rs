//! Records the events that the machines received and the actions that they returned, so that a run can be
//! replayed through the machines. The file has one JSON object per line.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::{Time, receiver, sender};
use serde::Serialize;
use tracing::warn;

/// A trace file, or no file if the run is not recorded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    file: Option<Arc<Mutex<BufWriter<File>>>>,
    rank: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Line<'a> {
    Sender(&'a sender::Config),
    Receiver(&'a receiver::Config),
    SenderEvent(Time, &'a sender::Event),
    ReceiverEvent(Time, &'a receiver::Event),
    SenderAction(&'a sender::Action),
    ReceiverAction(&'a receiver::Action),
}

#[derive(Serialize)]
struct Ranked<'a> {
    rank: u32,
    #[serde(flatten)]
    line: Line<'a>,
}

impl Trace {
    /// Begins a trace and replaces the file in `path`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub(crate) fn to_file(path: &Path) -> io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        Ok(Self {
            file: Some(Arc::new(Mutex::new(file))),
            rank: 0,
        })
    }

    /// Returns the same trace for another rank.
    pub(crate) fn of_rank(&self, rank: u32) -> Self {
        Self {
            file: self.file.clone(),
            rank,
        }
    }

    pub(crate) fn begin_sender(&self, config: &sender::Config) {
        self.write(Line::Sender(config));
    }

    pub(crate) fn begin_receiver(&self, config: &receiver::Config) {
        self.write(Line::Receiver(config));
    }

    pub(crate) fn sender_event(&self, now: Time, event: &sender::Event) {
        self.write(Line::SenderEvent(now, event));
    }

    pub(crate) fn receiver_event(&self, now: Time, event: &receiver::Event) {
        self.write(Line::ReceiverEvent(now, event));
    }

    pub(crate) fn sender_action(&self, action: &sender::Action) {
        self.write(Line::SenderAction(action));
    }

    pub(crate) fn receiver_action(&self, action: &receiver::Action) {
        self.write(Line::ReceiverAction(action));
    }

    fn write(&self, line: Line<'_>) {
        let Some(file) = &self.file else {
            return;
        };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let ranked = Ranked {
            rank: self.rank,
            line,
        };
        // Each line is flushed at once: otherwise a crash would lose the lines that led to it.
        let written = serde_json::to_writer(&mut *file, &ranked)
            .map_err(io::Error::from)
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| file.flush());
        if let Err(error) = written {
            warn!(%error, "trace line lost");
        }
    }
}
