//! Values that are one of a few words.

use std::fmt;

use super::{Value, scalar};
use crate::config::yaml::Raw;

/// Declares an enum of words that is a [`Value`].
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $want:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The word in configurations, logs and metrics.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl Value for $name {
            const WANT: &'static str = $want;

            fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
                match scalar(raw)?.trim().to_ascii_lowercase().as_str() {
                    $($text => Ok(Self::$variant),)*
                    _ => Err("none of the possible words".to_owned()),
                }
            }

            fn show(&self) -> String {
                self.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// Which side of transfers this sidecar is.
    Role, "sender, receiver or both", {
        /// Beside a prefill engine.
        Sender = "sender",
        /// Beside a decode engine.
        Receiver = "receiver",
        /// Beside an engine that takes either leg.
        Both = "both",
    }
}

words! {
    /// Whether UCX may open TCP ports.
    NixlOverTcp, "refused or trusted", {
        /// NIXL uses shared memory, CUDA IPC and RDMA only.
        Refused = "refused",
        /// The network keeps strangers from the ports that UCX opens.
        Trusted = "trusted",
    }
}

words! {
    /// Which wires may be used.
    Wire, "auto, cuda_ipc, nixl or tcp", {
        /// The best that both sides have.
        Auto = "auto",
        /// Copies between GPUs of one host or nothing.
        CudaIpc = "cuda_ipc",
        /// NIXL or nothing.
        Nixl = "nixl",
        /// The built-in TCP transport or nothing.
        Tcp = "tcp",
    }
}

words! {
    /// How log lines look.
    LogFormat, "text or json", {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}
