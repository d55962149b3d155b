//! LMCache's keys that the sidecar does not use. The sidecar ignores most of these keys and reports the
//! reason. If a key asks for something that the sidecar does not do, the sidecar refuses the key.

use super::key::{Default, Key, Section};
use super::layers::Layers;
use super::problem::Problem;
use super::value::{Any, Value};
use super::yaml::Raw;

/// A key of LMCache's that was given and has no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ignored {
    /// The key.
    pub(crate) key: String,
    /// The value as given.
    pub(crate) value: String,
    /// The source of the value.
    pub(crate) source: String,
    /// The reason why the key has no effect.
    pub(crate) why: &'static str,
}

/// A group of keys that have no effect, all for one reason.
#[derive(Debug)]
pub(crate) struct Group {
    /// The reason why the keys have no effect.
    pub(crate) why: &'static str,
    /// The keys, with their old names.
    pub(crate) keys: &'static [&'static str],
}

/// A key that is refused, except with a value that changes nothing.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The key.
    pub(crate) key: &'static str,
    /// Values that change nothing, so that they are accepted.
    pub(crate) harmless: &'static [&'static str],
    /// The reason for the refusal.
    pub(crate) why: &'static str,
    /// The advice for the user.
    pub(crate) instead: &'static str,
}

/// Looks for each of these keys and returns the ignored keys. Refused keys are added to `layers` as mistakes.
pub(crate) fn read(layers: &mut Layers) -> Vec<Ignored> {
    let mut ignored = Vec::new();
    for group in GROUPS {
        for name in group.keys {
            if let Some((source, raw)) = layers.find(&key(name)) {
                ignored.push(Ignored {
                    key: (*name).to_owned(),
                    value: raw.show(),
                    source: source.to_string(),
                    why: group.why,
                });
            }
        }
    }
    for refusal in REFUSALS {
        let Some((source, raw)) = layers.find(&key(refusal.key)) else {
            continue;
        };
        if is_harmless(refusal, &raw) {
            ignored.push(Ignored {
                key: refusal.key.to_owned(),
                value: raw.show(),
                source: source.to_string(),
                why: "with this value the key does nothing",
            });
        } else {
            layers.problems.push(Problem {
                place: source.to_string(),
                key: refusal.key.to_owned(),
                value: raw.show(),
                what: refusal.why.to_owned(),
                right: refusal.instead.to_owned(),
            });
        }
    }
    ignored
}

fn is_harmless(refusal: &Refusal, raw: &Raw) -> bool {
    let text = raw.show().to_ascii_lowercase();
    match bool::read(raw, &mut Vec::new()) {
        Ok(flag) => refusal.harmless.contains(&flag.show().as_str()),
        Err(_) => refusal.harmless.contains(&text.as_str()),
    }
}

fn key(name: &'static str) -> Key {
    Key {
        name,
        section: Section::Lmcache,
        aliases: &[],
        flag: "",
        default: Default::None,
        want: Any::WANT,
        doc: "",
    }
}

/// LMCache 0.5.6's keys that have no effect, grouped by reason.
pub(crate) const GROUPS: &[Group] = &[
    Group {
        why: "the sidecar waits for events and does not poll",
        keys: &["pd_condition_poll_interval_sec"],
    },
    Group {
        why: "the last, partial chunk always moves",
        keys: &["save_unfull_chunk"],
    },
    Group {
        why: "the engine's connector computes the keys; it reads this setting if LMCACHE_CONFIG_FILE names this \
              file",
        keys: &["pre_caching_hash_algorithm"],
    },
    Group {
        why: "the sidecar keeps no cache: it holds KV only during a transfer",
        keys: &[
            "local_cpu",
            "max_local_cpu_size",
            "local_cpu_use_hugepages",
            "reserve_local_cpu_size",
            "local_disk",
            "local_disk_path_sharding",
            "max_local_disk_size",
            "remote_url",
            "remote_serde",
            "use_layerwise",
            "save_decode_cache",
            "retrieve_locations",
            "store_location",
            "cache_policy",
            "cost_aware_half_life_seconds",
            "cost_aware_ewma_alpha",
            "numa_mode",
            "enable_async_loading",
            "blocking_timeout_secs",
            "priority_limit",
            "min_retrieve_tokens",
            "hit_miss_ratio",
            "storage_plugins",
            "external_backends",
            "remote_storage_plugins",
            "audit_actual_remote_url",
            "gds_path",
            "gds_path_sharding",
            "gds_buffer_size",
            "gds_backend",
            "use_gds",
            "maru_path",
            "maru_pool_size",
            "enable_lazy_memory_allocator",
            "lazy_memory_initial_ratio",
            "lazy_memory_expand_trigger_ratio",
            "lazy_memory_step_ratio",
            "lazy_memory_safe_size",
            "pin_timeout_sec",
            "pin_check_interval_sec",
            "enable_hidden_state_cache",
            "max_hidden_state_cpu_size",
            "hidden_state_layers",
            "hidden_states_retrieve_mode",
        ],
    },
    Group {
        why: "the sidecar answers no lookups",
        keys: &[
            "external_lookup_client",
            "lookup_timeout_ms",
            "lookup_server_worker_ids",
            "enable_scheduler_bypass_lookup",
        ],
    },
    Group {
        why: "the sidecar registers with the proxy, not with LMCache's controller",
        keys: &[
            "enable_controller",
            "lmcache_instance_id",
            "controller_url",
            "controller_pull_url",
            "controller_reply_url",
            "lmcache_worker_port",
            "lmcache_worker_ports",
            "lmcache_worker_ids",
            "lmcache_worker_heartbeat_delay_time",
            "lmcache_worker_heartbeat_time",
        ],
    },
    Group {
        why: "a part of `enable_p2p`, `enable_blending` or LMCache's server, which the sidecar does not have",
        keys: &[
            "p2p_host",
            "p2p_init_ports",
            "p2p_lookup_ports",
            "mp_host",
            "mp_port",
            "blend_recompute_ratios",
            "blend_thresholds",
            "blend_check_layers",
            "blend_min_tokens",
            "blend_special_str",
        ],
    },
    Group {
        why: "a setting of LMCache's process, not of transfers",
        keys: &[
            "py_enable_gc",
            "run_script_api_enabled",
            "internal_api_server_enabled",
            "internal_api_server_host",
            "internal_api_server_port_start",
            "internal_api_server_include_index_list",
            "internal_api_server_socket_path_prefix",
            "runtime_plugin_locations",
            "plugin_locations",
            "script_allowed_imports",
            "enable_chunk_statistics",
            "chunk_statistics_auto_start_statistics",
            "chunk_statistics_auto_exit_timeout_hours",
            "chunk_statistics_auto_exit_target_unique_chunks",
            "chunk_statistics_strategy",
            "enable_kv_events",
            "use_gpu_connector_v3",
            "app_id",
            "extra_config",
        ],
    },
];

/// LMCache's keys that are refused.
pub(crate) const REFUSALS: &[Refusal] = &[
    Refusal {
        key: "enable_p2p",
        harmless: &["false"],
        why: "LMCache does not allow it together with PD, and the sidecar does only PD",
        instead: "remove it or set it to false",
    },
    Refusal {
        key: "pd_backend_mode",
        harmless: &["async", "sync"],
        why: "LMCache's PD has no such backend; the sidecar serves peers of both, async and sync",
        instead: "remove it, or write async or sync",
    },
    Refusal {
        key: "pd_bidirectional",
        harmless: &["false"],
        why: "KV moves from prefill to decode only",
        instead: "remove it or set it to false",
    },
    Refusal {
        key: "enable_blending",
        harmless: &["false"],
        why: "the key of blended KV does not describe its content, so the sidecar cannot hand it over",
        instead: "remove it or set it to false",
    },
    Refusal {
        key: "remote_config_url",
        harmless: &[],
        why: "the sidecar fetches no configuration",
        instead: "write the keys into this file",
    },
    Refusal {
        key: "nixl_peer_port",
        harmless: &[],
        why: "LMCache no longer has this key: a receiver has two ports",
        instead: "set pd_peer_init_port and pd_peer_alloc_port",
    },
];
