//! The identity of this host, folders of this user, and the counter of frames that are not valid messages.

pub(crate) mod host_id;
pub(crate) mod malformed;
pub(crate) mod private_folder;
