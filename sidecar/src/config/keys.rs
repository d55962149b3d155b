//! The table of all keys that the sidecar reads. The reader, `check-config` and the tests of
//! docs/reference/configuration.md use this table.

use common::identity::Auth;

use super::key::{Default, Key, Section};
use super::layers::{Layers, Sourced};
use super::value::{
    Bytes, Count, Devices, Host, HostPort, LogFormat, Millis, NixlOverTcp, Port, Ports, Role,
    Seconds, Url, Value, Words,
};
use crate::transport::protection::Protection;
use crate::transport::table::Choice;

macro_rules! keys {
    ($(#[$doc:meta])* $raw:ident in $section:ident {
        $($(#[doc = $text:literal])+
        $name:ident: $type:ty = $default:expr $(, flag $flag:literal)? $(, also $alias:literal)*;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub(crate) struct $raw {
            $($(#[doc = $text])+ pub(crate) $name: Option<Sourced<$type>>,)*
        }

        impl $raw {
            /// The key of each field, in the order of the fields.
            pub(crate) const KEYS: &'static [Key] = &[$(Key {
                name: stringify!($name),
                section: Section::$section,
                aliases: &[$($alias),*],
                flag: concat!($($flag)?),
                default: $default,
                want: <$type as Value>::WANT,
                doc: concat!($($text),+),
            },)*];

            /// Reads every key. Mistakes are added to `layers`.
            pub(crate) fn read(layers: &mut Layers) -> Self {
                // Rust evaluates the fields in the order in which they are written, so each field gets its
                // own key of the table.
                let mut keys = Self::KEYS.iter();
                Self { $($name: keys.next().and_then(|key| layers.take(key)),)* }
            }
        }
    };
}

keys! {
    /// The keys of LMCache that the sidecar reads, as given.
    Lmcache in Lmcache {
        /// Must be true: PD is the only thing that the sidecar does, so it refuses `false`.
        enable_pd: bool = Default::Value("true"), also "enable_xpyd";
        /// Role of this sidecar in transfers.
        pd_role: Role = Default::Required("always"), flag "--role", also "nixl_role";
        /// Bytes of the send or landing buffer of each rank, rounded down to whole chunks.
        pd_buffer_size: Bytes = Default::Required("always"), flag "--buffer-size", also "nixl_buffer_size";
        /// Memory of the buffers: host memory, or the memory of the GPU on which the engine's rank runs.
        pd_buffer_device: Devices = Default::Value("cpu"), flag "--buffer-device", also "nixl_buffer_device";
        /// Receiver: address to which the init, alloc and TCP data ports are bound, and to which senders connect.
        pd_peer_host: Host = Default::Required("for a receiver"), flag "--host", also "nixl_peer_host";
        /// Receiver: port of the init handshake, one for each rank.
        pd_peer_init_port: Ports = Default::Required("for a receiver"), flag "--init-port", also "nixl_peer_init_port";
        /// Receiver: port of the alloc requests, one for each rank.
        pd_peer_alloc_port: Ports = Default::Required("for a receiver"), flag "--alloc-port", also "nixl_peer_alloc_port";
        /// Receiver: port for the queries of LMCache's bidirectional senders, one for each rank. Such a
        /// sender asks which KV it can read back. The sidecar always answers "none", because it keeps no KV.
        pd_peer_query_port: Ports = Default::None;
        /// Host of the proxy's registration port, or of LMCache's own proxy.
        pd_proxy_host: Host = Default::None, also "nixl_proxy_host";
        /// The proxy's registration port.
        pd_proxy_port: Port = Default::None, also "nixl_proxy_port";
        /// If true, the sidecar sends nothing to the proxy: neither registrations nor reports that a request's
        /// KV is written.
        pd_skip_proxy_notification: bool = Default::Value("false");
        /// If finite, the default of `sidecar.wait_ms`.
        pd_allocation_timeout_sec: Seconds = Default::Value("inf");
        /// The default of `sidecar.drain_timeout_ms`.
        pd_shutdown_timeout_sec: Seconds = Default::None;
        /// Must be `nixl`, the only channel that LMCache's PD knows.
        transfer_channel: String = Default::Value("nixl");
        /// Backends of NIXL. Only UCX is supported.
        nixl_backends: Words = Default::Value("[UCX]");
        /// The sidecar refuses an engine if the buffer cannot hold the chunks of this many tokens at the same
        /// time. 0 means no such check.
        pd_max_prefill_len: Count<0> = Default::Value("0");
        /// Tokens of a chunk. If given, the sidecar refuses an engine with another chunk size.
        chunk_size: Count<1> = Default::None;
    }
}

keys! {
    /// The sidecar's own keys, as given.
    Sidecar in Sidecar {
        /// Name of this sidecar in messages, logs and the proxy's registry; unique among the sidecars
        /// of a proxy.
        id: String = Default::Computed("HOSTNAME-ROLE-ADMINPORT"), flag "--id";
        /// Number of ranks, each with its own buffer: the larger of the tensor-parallel sizes of this engine
        /// and of the peers' engines.
        ranks: Count<1> = Default::Computed("as many as init ports; a sender: 1");
        /// Path of the unix socket that the engine connects to. The sidecar makes its folder with mode 0700.
        /// A sender keeps the file of its process lock in the same folder: with that file the next sidecar
        /// proves that this sidecar has ended. So in a container keep the folder on a volume.
        socket: String = Default::Computed("$XDG_RUNTIME_DIR/pd-sidecar/ROLE.sock, or /tmp/pd-sidecar-UID/ROLE.sock"), flag "--socket";
        /// Address of the admin server: health, metrics, registration.
        admin: HostPort = Default::Computed("127.0.0.1:7910 for a sender, else 127.0.0.1:7900"), flag "--admin";
        /// Base URL of the engine's OpenAI server, as the proxy reaches it.
        engine_url: Url = Default::Computed("http://127.0.0.1:8100 for a sender, else http://127.0.0.1:8200"), flag "--engine-url";
        /// The proxy's registration port. Not for LMCache's own proxy, which accepts no registrations.
        proxy: HostPort = Default::Computed("pd_proxy_host:pd_proxy_port, or no proxy"), flag "--proxy";
        /// Host name or address at which other hosts reach this machine. Peers get this name instead of
        /// `pd_peer_host`. The proxy gets this name instead of the host of `sidecar.admin` if that host is
        /// `0.0.0.0`.
        advertise_host: Host = Default::Computed("pd_peer_host, and the host of admin");
        /// Transports that the sidecar may use.
        transport: Choice = Default::Value("auto"), flag "--transport";
        /// Receiver: data port of the built-in TCP transport for rank 0; rank N uses this port + N. 0 means any
        /// free port; senders learn its number in the init handshake.
        tcp_port: Port = Default::Value("0");
        /// Sender: port of rank 0 at which decode sides fetch KV that the engine keeps, for routers that name no
        /// receiver; rank N uses this port + N. 0 means any free port; the engine's answers announce its number.
        /// It is bound to `pd_peer_host` (without that key: to 127.0.0.1).
        fetch_port: Port = Default::Computed("0 if an engine starts the sidecar and only this machine reaches the port, else no port");
        /// Senders send an XXH3 checksum of each chunk, and receivers compare it with the chunk that arrived.
        checksum: bool = Default::Value("off");
        /// If off, the sidecar pushes no KV, and each decode engine computes its prompts. For tests.
        push: bool = Default::Value("on"), flag "--no-push";
        /// Rule for the init, alloc, fetch and registration channels. `require`: every peer must prove a key of the
        /// roster, and the channels are encrypted. `prefer`: peers that know no keys are served, too; for migrations
        /// only. `off`: no peer proves a key.
        auth: Auth = Default::Value("off"), flag "--auth";
        /// File with this process's private key, which `sidecar keygen FILE` makes. Only the file's owner may open it,
        /// and the sidecar must run as the owner.
        key_file: String = Default::None, flag "--key-file";
        /// File with the public keys of all peers and of this process: a YAML map from each key to `name`, `roles` and
        /// `hosts`. The sidecar reads the file again when it changes, and at SIGHUP.
        roster: String = Default::None, flag "--roster";
        /// Uses, in addition to the roster, the senders and receivers that the proxy names. The roster then needs only this
        /// process and the proxy. The roster has precedence. A proxy can then let any process in.
        peers_from_proxy: bool = Default::Value("off");
        /// Protection of KV over the built-in TCP transport, between peers that prove keys. `authenticated`: nobody on
        /// the path can change or add bytes. `sealed`: nobody on the path can read them either. `plain`: a write needs
        /// only its lease's random id, which the encrypted alloc channel tells. If the two sides differ, the stronger
        /// value counts.
        data: Protection = Default::Computed("sealed; with auth off: plain");
        /// Lets ports listen beyond this machine without authentication.
        insecure: bool = Default::Value("off"), flag "--insecure";
        /// Lets NIXL open TCP ports that UCX chooses. Anyone who reaches such a port can read and write the
        /// memory of this process, and can end the process. The ports are bound to `pd_peer_host` (for a sender
        /// without that key: to `sidecar.advertise_host`, else 127.0.0.1).
        nixl_over_tcp: NixlOverTcp = Default::Value("refused");
        /// Sender: if the wire is slower than this rate in GB/s, the sender sends KV layer by layer, while
        /// the engine computes the last layers. Over a faster wire, sending by layers would slow the engine down
        /// by about as much time as it saves. 0 means never.
        layers_below_gb_s: Count<0> = Default::Value("100");
        /// Sender: time between two heartbeats of a lease; the lease ends after three missed heartbeats.
        heartbeat_ms: Millis = Default::Value("1000");
        /// Sender: longest time that a request may wait for room at the receiver. Receiver: the same limit for
        /// requests of LMCache's senders, whose messages contain no such limit.
        wait_ms: Millis = Default::Computed("pd_allocation_timeout_sec if finite, else 1000");
        /// Sender: longest time that a receiver waits for the decode leg of a request to park.
        park_ms: Millis = Default::Value("50");
        /// Sender: if a message has no answer for this time, the sender repeats the message.
        repeat_ms: Millis = Default::Value("500");
        /// Sender: longest time for the init handshake with a receiver.
        link_ms: Millis = Default::Value("5000");
        /// Sender: longest time that a request may spend without progress.
        stall_ms: Millis = Default::Value("30000");
        /// Receiver: longest time that a request waits for room or for its decode leg, even if the sender asks
        /// for more.
        max_wait_ms: Millis = Default::Value("5000");
        /// Receiver: longest time that a parked decode request waits for a sender.
        no_sender_ms: Millis = Default::Value("5000");
        /// Receiver: longest time that written KV waits for a decode request.
        unclaimed_ms: Millis = Default::Value("10000");
        /// Receiver: longest lease that a sender may ask for. LMCache's senders get slots for this time.
        max_lease_ms: Millis = Default::Value("30000");
        /// Sender: longest time for which an engine keeps KV for a decode side after it is computed, however often
        /// the decode side renews it. Receiver: longest time for which it renews the KV of a queued request.
        max_keep_ms: Millis = Default::Value("120000");
        /// Receiver: the writes of a sender on another host may still arrive for this time after the sender has
        /// ended. Over TCP the kernel still sends the data of an ended process, for up to 102 seconds. If there
        /// is only RDMA, one second is enough.
        fence_ms: Millis = Default::Value("120000");
        /// Maximum number of requests in flight per rank; the sidecar refuses further requests with `busy`.
        max_requests: Count<1> = Default::Value("1024");
        /// Receiver: slots that one sender may leave in quarantine before the receiver refuses its requests.
        max_quarantined: Count<1> = Default::Computed("a quarter of the slots");
        /// Time between two registrations at the proxy. Registrations are the sidecar's heartbeat for the
        /// proxy.
        register_ms: Millis = Default::Value("1000");
        /// Longest time that the sidecar waits for requests to end after SIGTERM. For KV that decode sides may still
        /// fetch, `sidecar.max_keep_ms` is the limit.
        drain_timeout_ms: Millis = Default::Computed("pd_shutdown_timeout_sec, else 10000"), flag "--drain-timeout";
        /// Log level: error, warn, info, debug, trace, or directives like `info,sidecar=debug`.
        log_level: String = Default::Value("info"), flag "--log-level";
        /// Format of log lines.
        log_format: LogFormat = Default::Value("text"), flag "--log-format";
        /// File into which the sidecar writes the events and actions of the protocol's state machines, for a
        /// replay.
        trace: String = Default::None, flag "--trace";
    }
}
