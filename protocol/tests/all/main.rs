//! All integration tests of the protocol, as modules of one binary.

mod again;
mod corpora;
mod document;
mod epochs;
mod expected;
mod field_tables;
mod fixtures;
mod happy;
mod kept;
mod kept_cross;
mod kept_faults;
mod last_word;
mod lists;
mod lmcache_groups;
mod lmcache_receivers;
mod lmcache_senders;
mod plans;
mod replay;
mod reservations;
mod setup;
mod shares;
mod simulated;
mod simulated_groups;
mod two_engines;
mod work;
mod world;
