//! Makes the configurations of the protocol machines.

use protocol::local::Target;
use protocol::registration::InstanceRole;
use protocol::{Epoch, Layout, receiver, sender};

use super::{Config, Role};

impl Config {
    /// Returns the configuration of a rank's sender machine.
    pub(crate) fn sender_config(
        &self,
        rank: u32,
        epoch: Epoch,
        slots: u32,
        layout: Layout,
    ) -> sender::Config {
        let times = self.times;
        sender::Config {
            id: self.rank_id(rank),
            epoch,
            slots,
            layout,
            max_requests: self.max_requests as usize,
            heartbeat: times.heartbeat,
            wait: times.wait,
            park: times.park,
            repeat: times.repeat,
            link: times.link,
            stall: times.stall,
            max_keep: times.max_keep,
            push_off: !self.push,
        }
    }

    /// Returns the configuration of a receiver machine, which is the same for all ranks. `None` if the layout
    /// has no size (an unknown dtype).
    pub(crate) fn receiver_config(
        &self,
        epoch: Epoch,
        slots: u32,
        layout: &Layout,
        address: Option<Target>,
    ) -> Option<receiver::Config> {
        let times = self.times;
        Some(receiver::Config {
            epoch,
            slots,
            token_bytes: layout.token_bytes()?,
            chunk_tokens: layout.chunk_tokens,
            max_requests: self.max_requests as usize,
            max_quarantined: self.max_quarantined.unwrap_or((slots / 4).max(1)),
            no_sender: times.no_sender,
            unclaimed: times.unclaimed,
            max_lease: times.max_lease,
            max_wait: times.max_wait,
            lmcache_wait: times.wait.min(times.max_wait),
            layout: Some(layout.clone()),
            address,
            max_expect: times.max_keep,
            // A lease id is a permission to write, so a peer must not be able to guess the first id.
            seed: rand::random(),
        })
    }

    /// Returns the name of one rank's machine. Receivers number the messages of each name, so two ranks of
    /// one sidecar must not share a name.
    pub(crate) fn rank_id(&self, rank: u32) -> String {
        if self.ranks == 1 {
            self.id.clone()
        } else {
            format!("{}/{rank}", self.id)
        }
    }

    /// Returns the legs that the engine serves.
    pub(crate) fn instance_role(&self) -> InstanceRole {
        match self.role {
            Role::Sender => InstanceRole::Prefill,
            Role::Receiver => InstanceRole::Decode,
            Role::Both => InstanceRole::Both,
        }
    }
}
