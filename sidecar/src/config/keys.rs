//! The table of all keys that the sidecar reads. The reader, `check-config` and the tests of
//! docs/configuration.md use this table.

use super::key::{Default, Key, Section};
use super::layers::{Layers, Sourced};
use super::value::{
    Bytes, Count, Devices, Host, HostPort, LogFormat, Millis, NixlOverTcp, Port, Ports, Role,
    Seconds, Url, Value, Wire, Words,
};

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
                // Rust evaluates the fields in the order in which they are written, so each gets its own key
                // of the table.
                let mut keys = Self::KEYS.iter();
                Self { $($name: keys.next().and_then(|key| layers.take(key)),)* }
            }
        }
    };
}

keys! {
    /// The keys of LMCache that the sidecar reads, as given.
    Lmcache in Lmcache {
        /// PD is what the sidecar does; `false` is refused.
        enable_pd: bool = Default::Value("true"), also "enable_xpyd";
        /// Which side of transfers this sidecar is.
        pd_role: Role = Default::Required("always"), flag "--role", also "nixl_role";
        /// Bytes of the send or landing buffer of each rank, cut down to whole chunks.
        pd_buffer_size: Bytes = Default::Required("always"), flag "--buffer-size", also "nixl_buffer_size";
        /// Memory of the buffers: host memory, or the memory of the GPU that the engine's rank runs on.
        pd_buffer_device: Devices = Default::Value("cpu"), flag "--buffer-device", also "nixl_buffer_device";
        /// Receiver: the address that the init, alloc and TCP data ports are bound to and that
        /// senders connect to.
        pd_peer_host: Host = Default::Required("for a receiver"), flag "--host", also "nixl_peer_host";
        /// Receiver: port of the init handshake, one a rank.
        pd_peer_init_port: Ports = Default::Required("for a receiver"), flag "--init-port", also "nixl_peer_init_port";
        /// Receiver: port of the alloc requests, one a rank.
        pd_peer_alloc_port: Ports = Default::Required("for a receiver"), flag "--alloc-port", also "nixl_peer_alloc_port";
        /// Receiver: port on which LMCache's bidirectional senders ask what they could read back, one a
        /// rank. The answer is always nothing: slots are transit.
        pd_peer_query_port: Ports = Default::None;
        /// Host of the proxy's registration port, or of LMCache's own proxy.
        pd_proxy_host: Host = Default::None, also "nixl_proxy_host";
        /// The proxy's registration port.
        pd_proxy_port: Port = Default::None, also "nixl_proxy_port";
        /// Nothing is sent to the proxy: neither registration nor the word that a request's KV has
        /// been written.
        pd_skip_proxy_notification: bool = Default::Value("false");
        /// If finite: what `sidecar.wait_ms` is when it is not given.
        pd_allocation_timeout_sec: Seconds = Default::Value("inf");
        /// The default of `sidecar.drain_timeout_ms`.
        pd_shutdown_timeout_sec: Seconds = Default::None;
        /// `nixl` is the only one that LMCache's PD knows.
        transfer_channel: String = Default::Value("nixl");
        /// Backends of NIXL. Only UCX is supported.
        nixl_backends: Words = Default::Value("[UCX]");
        /// If not 0: an engine for whose chunks the buffer has not room for so many tokens at once is refused.
        pd_max_prefill_len: Count<0> = Default::Value("0");
        /// Tokens of a chunk. If given, an engine with another chunk size is refused.
        chunk_size: Count<1> = Default::None;
    }
}

keys! {
    /// The sidecar's own keys, as given.
    Sidecar in Sidecar {
        /// Name of this sidecar in messages, logs and the proxy's registry; unique among the sidecars
        /// of a proxy.
        id: String = Default::Computed("HOSTNAME-ROLE-ADMINPORT"), flag "--id";
        /// Ranks of the engine, each with a buffer of its own: its tensor-parallel size, or the other side's if that is
        /// larger.
        ranks: Count<1> = Default::Computed("as many as init ports; a sender: 1");
        /// Path of the unix socket that the engine connects to. Its directory is made with mode 0700. Beside
        /// it a sender keeps a file by which its successor can vouch for its end: in a container the
        /// directory should outlive it.
        socket: String = Default::Computed("$XDG_RUNTIME_DIR/pd-sidecar/ROLE.sock, or /tmp/pd-sidecar-UID/ROLE.sock"), flag "--socket";
        /// Address of the admin server: health, metrics, registration.
        admin: HostPort = Default::Computed("127.0.0.1:7910 for a sender, else 127.0.0.1:7900"), flag "--admin";
        /// Base URL of the engine's OpenAI server, as the proxy reaches it.
        engine_url: Url = Default::Computed("http://127.0.0.1:8100 for a sender, else http://127.0.0.1:8200"), flag "--engine-url";
        /// The proxy's registration port. Not for LMCache's own proxy, which takes no registrations.
        proxy: HostPort = Default::Computed("pd_proxy_host:pd_proxy_port, or no proxy"), flag "--proxy";
        /// Host that others reach this machine at, where an address above is `0.0.0.0`.
        advertise_host: Host = Default::Computed("pd_peer_host, and the host of admin");
        /// Which wires may be used.
        transport: Wire = Default::Value("auto"), flag "--transport";
        /// Receiver: data port of the built-in TCP transport for rank 0; rank N takes the Nth after
        /// it. 0 is any free one: the init handshake tells senders which.
        tcp_port: Port = Default::Value("0");
        /// Senders send an XXH3 of each chunk, and receivers check it.
        checksum: bool = Default::Value("off");
        /// Off: no KV is pushed and every decode computes its own. For tests.
        push: bool = Default::Value("on"), flag "--no-push";
        /// Lets ports listen beyond this machine without authentication.
        insecure: bool = Default::Value("off"), flag "--insecure";
        /// Lets NIXL open TCP ports of its own, which UCX chooses: whoever reaches such a port
        /// reads and writes the memory of this process, and can end it. They are bound to
        /// `pd_peer_host` (a sender without it: `sidecar.advertise_host`, else 127.0.0.1).
        nixl_over_tcp: NixlOverTcp = Default::Value("refused");
        /// Sender: the rate of a wire, in GB/s, up to which KV should leave layer by layer, while the last
        /// layers are computed. That slows the computing down, by about as much as a faster wire needs for
        /// the whole. 0: never.
        layers_below_gb_s: Count<0> = Default::Value("100");
        /// Sender: time between two signs of life under a lease; three missed end it.
        heartbeat_ms: Millis = Default::Value("1000");
        /// Sender: how long a receiver may hold a request for room. Receiver: how long one of LMCache's
        /// senders is held for it, which say nothing themselves.
        wait_ms: Millis = Default::Computed("pd_allocation_timeout_sec if finite, else 1000");
        /// Sender: how long a receiver may hold a request for its decode leg to park.
        park_ms: Millis = Default::Value("50");
        /// Sender: after this time without an answer a message is repeated.
        repeat_ms: Millis = Default::Value("500");
        /// Sender: how long the init handshake with a receiver may take.
        link_ms: Millis = Default::Value("5000");
        /// Sender: how long a request may go without progress.
        stall_ms: Millis = Default::Value("30000");
        /// Receiver: the longest that a request is held for room or its decode leg, whatever the
        /// sender asks for.
        max_wait_ms: Millis = Default::Value("5000");
        /// Receiver: how long a parked decode request waits for a sender.
        no_sender_ms: Millis = Default::Value("5000");
        /// Receiver: how long written KV waits for a decode request.
        unclaimed_ms: Millis = Default::Value("10000");
        /// Receiver: the longest silence that a sender may ask for, and how long slots are lent to
        /// LMCache's senders.
        max_lease_ms: Millis = Default::Value("30000");
        /// Receiver: how long after the end of a sender on another host its writes may still be under way.
        /// The kernel goes on sending for a process that has ended, if the wire is TCP, for up to 102
        /// seconds; where there is only RDMA, a second is enough.
        fence_ms: Millis = Default::Value("120000");
        /// Requests under way at once and rank; more are refused as `busy`.
        max_requests: Count<1> = Default::Value("1024");
        /// Receiver: slots that one sender may leave quarantined before it is refused.
        max_quarantined: Count<1> = Default::Computed("a quarter of the slots");
        /// Time between two registrations at the proxy, which are the heartbeat.
        register_ms: Millis = Default::Value("1000");
        /// Longest time for requests to end after SIGTERM.
        drain_timeout_ms: Millis = Default::Computed("pd_shutdown_timeout_sec, else 10000"), flag "--drain-timeout";
        /// Log level: error, warn, info, debug, trace, or directives like `info,sidecar=debug`.
        log_level: String = Default::Value("info"), flag "--log-level";
        /// Format of log lines.
        log_format: LogFormat = Default::Value("text"), flag "--log-format";
        /// File that takes the events and actions of the protocol machines, to replay them.
        trace: String = Default::None, flag "--trace";
    }
}
