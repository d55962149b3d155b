//! The self-test on GPU memory: two buffers, each with a sidecar process. This process acts as both engines.
//!
//! This process does the same as a vLLM worker: it opens the buffers by their handles, fills slots on a
//! stream, and reports an event to the sidecar instead of waiting. Every third request is filled a few
//! milliseconds after it was reported as staged. If the sidecar did not wait for the event, it would push the
//! bytes of an earlier request, and the comparison would show that.

mod content;
mod process;

use std::time::Duration;

use protocol::local::{EngineRole, Target};

use self::content::{EVENTS, GpuContent, Half};
use self::process::Sidecar;
use super::engine::{Engine, Gpu};
use super::report::Report;
use super::rounds::Rounds;
use super::{Directory, LOOPBACK, Memory};
use crate::cli::Selftest;
use crate::memory::cuda::{Device, Which};
use crate::transport::Kind;

impl Selftest {
    pub(super) async fn between_gpus(
        &self,
        from: &Which,
        to: &Which,
        wire: Kind,
        seconds: Duration,
    ) -> anyhow::Result<Report> {
        let directory = Directory::new()?;
        let (prefill_gpu, decode_gpu) = (Device::open(from)?, Device::open(to)?);
        let [init, alloc] = [process::free_port()?, process::free_port()?];
        let receiver = Sidecar::start(&directory.path, "receiver", |args| {
            args.extend(["--host".into(), LOOPBACK.into()]);
            args.extend(["--init-port".into(), init.to_string()]);
            args.extend(["--alloc-port".into(), alloc.to_string()]);
            self.common(args, to, wire);
        })?;
        let sender = Sidecar::start(&directory.path, "sender", |args| {
            self.common(args, from, wire)
        })?;
        // Both processes start at the same time, because CUDA's and NIXL's start takes seconds.
        let receiver = receiver.ready().await?;
        let sender = sender.ready().await?;

        let layout = self.layout();
        // The hello of the prefill engine needs the events, so they are made before the connection.
        let mut half = Half::new(prefill_gpu)?;
        let events = half.share(EVENTS)?;
        let gpu = Gpu {
            device: Some(half.device().uuid().to_string()),
            events,
        };
        let prefill = Engine::connect(&sender.socket, EngineRole::Prefill, layout.clone(), gpu);
        let prefill = prefill.await?;
        let gpu = Gpu {
            device: Some(decode_gpu.uuid().to_string()),
            events: Vec::new(),
        };
        let decode = Engine::connect(&receiver.socket, EngineRole::Decode, layout.clone(), gpu);
        let decode = decode.await?;
        let content = GpuContent::new(
            half,
            &prefill.welcome,
            Half::new(decode_gpu)?,
            &decode.welcome,
        )?;
        let target = Target {
            host: LOOPBACK.to_owned(),
            init_port: init,
            alloc_port: alloc,
        };
        let mut rounds = Rounds::new(prefill, decode, Box::new(content), target, &layout);
        // The logs of both processes show the cause of a failed request, and they are deleted with the
        // directory.
        if let Err(error) = rounds.run(seconds).await {
            let tails = format!("{}\n{}", sender.tail(), receiver.tail());
            return Err(error.context(tails));
        }
        let pushed = sender.pushed().await?;
        let link = sender.link().await?;
        let memory = Memory::Gpus(from.clone(), to.clone()).to_string();
        Ok(Report::new(wire, memory, link, &rounds, &pushed))
    }

    fn common(&self, args: &mut Vec<String>, which: &Which, wire: Kind) {
        let device = match which {
            Which::Ordinal(_) => which.to_string(),
            Which::Uuid(uuid) => format!("cuda:{uuid}"),
        };
        args.extend(["--buffer-size".to_owned(), self.buffer_size.to_string()]);
        args.extend(["--buffer-device".to_owned(), device]);
        args.extend(["--transport".to_owned(), wire.as_str().to_owned()]);
    }
}
