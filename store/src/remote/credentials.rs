//! The file with the credentials of a remote store.
//!
//! Its lines are `name = value`. Empty lines, lines that begin with `#`, and the headline `[default]` are allowed, so
//! Amazon's own credentials file with one profile can be used as it stands.

use std::fmt;
use std::path::Path;

use common::identity::read_secret;

/// Credentials. Their debug form shows no value.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User of Valkey or Redis; absent for the default user.
    pub username: Option<String>,
    /// Password of Valkey or Redis.
    pub password: Option<String>,
    /// The id of an S3 key.
    pub access_key_id: Option<String>,
    /// The S3 key.
    pub secret_access_key: Option<String>,
    /// Token of a temporary S3 key.
    pub session_token: Option<String>,
}

impl Credentials {
    /// Reads a file. Only the user of this process, or root, may be able to read the file.
    ///
    /// # Errors
    /// The file, its mistake and the cure. The error contains no value of the file.
    pub fn load(path: &Path) -> Result<Self, String> {
        let bytes = read_secret(path, MAX_FILE_BYTES).map_err(|error| error.to_string())?;
        let text =
            String::from_utf8(bytes).map_err(|_| format!("{}: not UTF-8", path.display()))?;
        Self::parse(&text).map_err(|mistake| format!("{}: {mistake}", path.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut read = Self::default();
        for (at, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') || line == "[default]" {
                continue;
            }
            let (name, value) = line
                .split_once('=')
                .map(|(name, value)| (name.trim(), value.trim()))
                .ok_or_else(|| format!("line {at} is not of the form name = value"))?;
            let place = match name {
                "username" => &mut read.username,
                "password" => &mut read.password,
                "aws_access_key_id" => &mut read.access_key_id,
                "aws_secret_access_key" => &mut read.secret_access_key,
                "aws_session_token" => &mut read.session_token,
                _ => {
                    return Err(format!(
                        "line {at}: the name is not one of username, password, aws_access_key_id, \
                         aws_secret_access_key, aws_session_token"
                    ));
                }
            };
            if value.is_empty() {
                return Err(format!("line {at}: {name} has no value"));
            }
            if place.replace(value.to_owned()).is_some() {
                return Err(format!(
                    "line {at}: {name} is given twice; keep one of them"
                ));
            }
        }
        if read == Self::default() {
            return Err("no credentials in it".to_owned());
        }
        if read.access_key_id.is_some() != read.secret_access_key.is_some() {
            return Err("aws_access_key_id and aws_secret_access_key belong together".to_owned());
        }
        Ok(read)
    }

    /// Returns a text in which each of these values is replaced, for errors of a server that repeat what they were sent.
    pub(super) fn hide(&self, text: &str) -> String {
        let values = [
            &self.password,
            &self.access_key_id,
            &self.secret_access_key,
            &self.session_token,
        ];
        let mut hidden = text.to_owned();
        for value in values.into_iter().flatten() {
            hidden = hidden.replace(value.as_str(), "***");
        }
        hidden
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// More than any file of credentials needs.
const MAX_FILE_BYTES: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn amazons_file_with_one_profile_can_be_used() {
        let read = Credentials::parse(
            "[default]\n# a key\naws_access_key_id = AKIA\naws_secret_access_key=s/e=c\n\n",
        );
        let read = read.unwrap();
        assert_eq!(read.access_key_id.as_deref(), Some("AKIA"));
        assert_eq!(read.secret_access_key.as_deref(), Some("s/e=c"));
        assert_eq!(format!("{read:?}"), "Credentials");
        assert_eq!(read.hide("key AKIA, s/e=c"), "key ***, ***");
    }

    #[test]
    fn a_mistake_is_named_without_values() {
        for (text, named) in [
            ("", "no credentials"),
            ("hunter2", "line 1 is not"),
            ("password =", "password has no value"),
            ("\npasswort = hunter2", "line 2: the name"),
            ("password = hunter2\npassword = b", "given twice"),
            ("aws_access_key_id = hunter2", "belong together"),
        ] {
            let mistake = Credentials::parse(text).unwrap_err();
            assert!(mistake.contains(named), "{mistake}");
            assert!(!mistake.contains("hunter2"), "{mistake}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        std::fs::write(&path, "password = hunter2").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let mistake = Credentials::load(&path).unwrap_err();
        assert!(mistake.contains("chmod 600"), "{mistake}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let read = Credentials::load(&path).unwrap();
        assert_eq!(read.password.as_deref(), Some("hunter2"));
    }
}
