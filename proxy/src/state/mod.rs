//! The state that all requests and tasks of one proxy share.

pub(crate) mod app;
pub(crate) mod in_flight;
pub(crate) mod stored_responses;
pub(crate) mod tokenise;
pub(crate) mod uploads;
