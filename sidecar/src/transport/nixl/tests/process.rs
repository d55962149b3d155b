//! Runs the receiving process of a test.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use protocol::dlist::{Memory, Row};

use super::{DEVICE, library, start};
use crate::transport::{HandshakeFields, Remote, Transport};

/// A receiving process and the pipes to it.
pub(in super::super) struct Receiver {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    pub(in super::super) remote: Remote,
}

impl Receiver {
    pub(in super::super) fn start(slots: u32, slot_bytes: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::nixl::tests::process::receiver"])
            .args(["--ignored", "--nocapture"])
            .env(CHILD, format!("{slots},{slot_bytes}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut receiver = Self {
            remote: Remote {
                name: format!("receiver-{}", child.id()),
                id: None,
                fields: HandshakeFields::default(),
                memory: Memory::Dram,
                slots,
                slot_bytes,
                address: None,
            },
            child,
            input,
            output,
        };
        receiver.remote.fields.metadata = unhex(&receiver.answer("metadata"));
        let address: u64 = receiver.answer("address").parse().unwrap();
        receiver.remote.fields.rows = (0..u64::from(slots))
            .map(|slot| Row {
                address: address + slot * slot_bytes,
                bytes: slot_bytes,
                device: DEVICE,
            })
            .collect();
        receiver
    }

    /// Sends a line and returns the child's answer.
    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        let word = line.split_whitespace().next().unwrap();
        self.answer(word)
    }

    fn answer(&mut self, word: &str) -> String {
        let prefix = format!("@{word} ");
        loop {
            let line = self
                .output
                .next()
                .expect("the receiver process has ended")
                .unwrap();
            if let Some((_, text)) = line.split_once(&prefix) {
                return text.to_owned();
            }
        }
    }

    pub(in super::super) fn sum(&mut self, slot: u32, bytes: u64) -> u64 {
        self.ask(&format!("sum {slot} {bytes}")).parse().unwrap()
    }

    pub(in super::super) fn expect(&mut self, writing: bool) {
        self.ask(&format!("expect {writing}"));
    }

    pub(in super::super) fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    pub(in super::super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // The test may have killed the process already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An environment variable that only the receiving process has: `slots,slot_bytes`.
const CHILD: &str = "PD_NIXL_TEST_RECEIVER";

/// Runs in the receiving process: carries out the lines of its input until the input ends.
#[test]
#[ignore = "the other half of the tests"]
fn receiver() {
    let Ok(shape) = std::env::var(CHILD) else {
        return;
    };
    let (slots, slot_bytes) = shape.split_once(',').unwrap();
    let (slots, slot_bytes): (u32, u64) = (slots.parse().unwrap(), slot_bytes.parse().unwrap());
    let (nixl, buffer) = start(library().unwrap(), slots, slot_bytes);
    let rows = nixl.rows();
    assert_eq!(rows.len(), slots as usize);
    let say = |word: &str, text: String| {
        println!("@{word} {text}");
        std::io::stdout().flush().unwrap();
    };
    say("metadata", hex(&nixl.handshake_fields().unwrap().metadata));
    say("address", rows[0].address.to_string());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["sum", slot, bytes] => {
                let offset = slot.parse::<u64>().unwrap() * slot_bytes;
                let sum = buffer.sum(offset, bytes.parse().unwrap()).unwrap();
                say("sum", sum.to_string());
            }
            ["expect", writing] => {
                nixl.expect(writing.parse().unwrap());
                say("expect", String::new());
            }
            _ => panic!("{line}"),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}
