//! Values that are one of a few words.

use std::fmt;

use common::identity::Auth;

use super::{Value, scalar};
use crate::config::yaml::Raw;
use crate::transport::protection::Protection;
use crate::transport::table::{CHOICES, Choice};

fn unknown() -> String {
    "not one of the possible values".to_owned()
}

/// Declares an enum whose variants are words, and makes it a [`Value`].
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $want:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// Returns the word for configurations, logs and metrics.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl Value for $name {
            const WANT: &'static str = $want;

            fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
                match scalar(raw)?.trim().to_ascii_lowercase().as_str() {
                    $($text => Ok(Self::$variant),)*
                    _ => Err(unknown()),
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
    /// The role of this sidecar in transfers.
    Role, "sender, receiver or both", {
        /// The sidecar runs beside a prefill engine.
        Sender = "sender",
        /// The sidecar runs beside a decode engine.
        Receiver = "receiver",
        /// The sidecar runs beside an engine that does prefill and decode.
        Both = "both",
    }
}

words! {
    /// The user's decision about TCP ports that UCX opens.
    NixlOverTcp, "refused or trusted", {
        /// NIXL uses shared memory, CUDA IPC and RDMA only.
        Refused = "refused",
        /// UCX may open TCP ports, because only trusted processes reach them in this network.
        Trusted = "trusted",
    }
}

/// One of the transports, or `auto`.
impl Value for Choice {
    const WANT: &'static str = CHOICES;

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        Choice::named(&scalar(raw)?.trim().to_ascii_lowercase()).ok_or_else(unknown)
    }

    fn show(&self) -> String {
        self.as_str().to_owned()
    }
}

/// The rule for peers without a key.
impl Value for Auth {
    const WANT: &'static str = "off, prefer or require";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let word = scalar(raw)?.trim().to_ascii_lowercase();
        let all = [Self::Off, Self::Prefer, Self::Require];
        // YAML reads the plain word `off` as false.
        let word = if word == "false" { "off" } else { &word };
        let found = all.into_iter().find(|auth| auth.as_str() == word);
        found.ok_or_else(unknown)
    }

    fn show(&self) -> String {
        self.as_str().to_owned()
    }
}

/// The protection of data on the built-in TCP transport.
impl Value for Protection {
    const WANT: &'static str = "plain, authenticated or sealed";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let word = scalar(raw)?.trim().to_ascii_lowercase();
        let found = Self::ALL.into_iter().find(|one| one.as_str() == word);
        found.ok_or_else(unknown)
    }

    fn show(&self) -> String {
        self.as_str().to_owned()
    }
}

words! {
    /// The format of log lines.
    LogFormat, "text or json", {
        /// For people.
        Text = "text",
        /// One JSON object per line.
        Json = "json",
    }
}
