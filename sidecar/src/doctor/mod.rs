//! `sidecar doctor`: looks at a host, a configuration, running programs and peers, and reports every fault with its cure.
//!
//! Each area is one file with the kinds of its findings and a function that looks. A look changes nothing, and each wait in
//! it has a bound.

mod configuration;
mod cpu;
mod finding;
mod gpus;
mod keys;
mod libraries;
mod limits;
mod pages;
mod pair;
mod peers;
mod ports;
mod proxy;
mod rdma;
mod reach;
mod report;
mod room;
mod running;
mod sockets;
mod subject;
mod together;
mod ucx;
mod ucx_log;
mod wires;

use std::io::Write;

use crate::cli::Doctor;
use crate::config::{Config, Inputs, Report as ConfigReport};
use crate::exit::Exit;
use finding::{Kind, Results};
use pages::Program;
use report::Report;
use subject::{Host, Subject};

/// The areas, in the order of the report.
static AREAS: &[Area] = &[
    Area {
        title: "Configuration",
        kinds: configuration::KINDS,
        look: configuration::look,
    },
    Area {
        title: "Keys and roster",
        kinds: keys::KINDS,
        look: keys::look,
    },
    Area {
        title: "Socket",
        kinds: sockets::KINDS,
        look: sockets::look,
    },
    Area {
        title: "Ports",
        kinds: ports::KINDS,
        look: ports::look,
    },
    Area {
        title: "Memory",
        kinds: room::KINDS,
        look: room::look,
    },
    Area {
        title: "Limits",
        kinds: limits::KINDS,
        look: limits::look,
    },
    Area {
        title: "Processors",
        kinds: cpu::KINDS,
        look: cpu::look,
    },
    Area {
        title: "GPUs",
        kinds: gpus::KINDS,
        look: gpus::look,
    },
    Area {
        title: "RDMA",
        kinds: rdma::KINDS,
        look: rdma::look,
    },
    Area {
        title: "Libraries",
        kinds: libraries::KINDS,
        look: libraries::look,
    },
    Area {
        title: "Settings of UCX",
        kinds: ucx::KINDS,
        look: ucx::look,
    },
    Area {
        title: "Proxy",
        kinds: proxy::KINDS,
        look: proxy::look,
    },
    Area {
        title: "Receivers (`--peer`)",
        kinds: peers::KINDS,
        look: peers::look,
    },
    Area {
        title: "Running programs (`--at`)",
        kinds: running::KINDS,
        look: running::look,
    },
];

/// The kinds of findings outside of [`AREAS`].
static OTHERS: &[(&str, &[&Kind])] = &[
    ("Running programs, compared", together::KINDS),
    ("Measurements of this host", wires::KINDS),
    (
        "Measurements between two hosts (`--push`, `--answer`)",
        pair::KINDS,
    ),
];

/// A part of the examination.
#[derive(Debug)]
struct Area {
    /// The heading of its table.
    title: &'static str,
    /// The findings that the area can have.
    kinds: &'static [&'static Kind],
    /// Looks, and adds findings and facts.
    look: fn(&Subject<'_>, &mut Results),
}

impl Doctor {
    /// Examines everything and prints the report.
    pub(crate) fn run(&self) -> Exit {
        if self.reference {
            say(&reference());
            return Exit::Ok;
        }
        if let Some(unknown) = self
            .ignore
            .iter()
            .find(|code| !kinds().any(|kind| kind.code == *code))
        {
            eprintln!(
                "error: --ignore {unknown}: no finding has this code; docs/doctor.md lists the codes"
            );
            return Exit::Usage;
        }
        let inputs = match Inputs::of_process(self.overrides.flags(), self.file.clone()) {
            Ok(inputs) => inputs,
            Err(error) => {
                eprintln!("error: {error}");
                return Exit::Usage;
            }
        };
        let (config, read) = load(&inputs);
        if (self.answer || self.push.is_some()) && read.is_none() {
            eprintln!(
                "error: --push and --answer need the configuration of the running sidecar: name its file"
            );
            return Exit::Usage;
        }
        let host = Host::this();
        let subject = Subject {
            host: &host,
            env: &inputs.env,
            config: config.as_ref(),
            report: read.as_ref(),
            is_running: config.as_ref().is_some_and(is_running),
            at: &self.at,
            peers: &self.peer,
        };
        let mut results = Results::default();
        for area in AREAS {
            (area.look)(&subject, &mut results);
        }
        if let (Some(config), Some(to)) = (&config, &self.push) {
            self.progress(&format!(
                "pushing to {}:{}, where the doctor's --answer has to run ...",
                to.host, to.init_port
            ));
            pair::push(config, to, self.seconds, &mut results);
        } else if let (Some(config), true) = (&config, self.answer) {
            self.progress("waiting for the doctor's --push of another host ...");
            pair::answer(config, &mut results);
        } else if self.seconds > 0 {
            wires::measure(
                &subject,
                self.seconds,
                &|text| self.progress(text),
                &mut results,
            );
        }
        let report = Report::new(results, &self.ignore);
        let text = if self.json {
            format!("{:#}\n", report.json())
        } else {
            report.to_string()
        };
        say(&text);
        report.exit()
    }

    fn progress(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }
}

/// Reads the configuration, if there is one: a file, a flag, or the role in the environment. Other variables, such as the
/// path of the socket, are also set for engines and do not make a configuration.
fn load(inputs: &Inputs) -> (Option<Config>, Option<ConfigReport>) {
    let role = inputs.env.iter().find(|(name, _)| name == ROLE_VARIABLE);
    let has_role = role.is_some_and(|(_, value)| !value.is_empty());
    if inputs.file.is_none() && inputs.flags.is_empty() && !has_role {
        return (None, None);
    }
    match Config::load(inputs) {
        Ok((config, report)) => (Some(config), Some(report)),
        Err(report) => (None, Some(*report)),
    }
}

/// Returns true if a sidecar with this configuration runs already, so that its ports and its memory are taken by itself.
fn is_running(config: &Config) -> bool {
    if config.admin.port == 0 {
        return false;
    }
    let running = pages::read(&config.admin_url(config.admin.port));
    matches!(running.map(|running| running.kind), Ok(Program::Sidecar(status)) if status.id == config.id)
}

/// Returns the tables of docs/doctor.md: one for each area.
fn reference() -> String {
    let mut text = String::new();
    for (title, kinds) in tables() {
        text += &format!(
            "\n### {title}\n\n| code | severity | why it matters | cure |\n|---|---|---|---|\n"
        );
        for kind in kinds {
            let severity = kind.severity.as_str();
            text += &format!(
                "| `{}` | {severity} | {} | {} |\n",
                kind.code, kind.why, kind.cure
            );
        }
    }
    text
}

/// Returns each title with its kinds of findings.
fn tables() -> impl Iterator<Item = (&'static str, &'static [&'static Kind])> {
    let areas = AREAS.iter().map(|area| (area.title, area.kinds));
    areas.chain(OTHERS.iter().copied())
}

/// Returns the kinds of all findings.
fn kinds() -> impl Iterator<Item = &'static Kind> {
    tables().flat_map(|(_, kinds)| kinds.iter().copied())
}

/// Prints to standard output. A closed pipe, for example to `head`, is not an error.
fn say(text: &str) {
    std::io::stdout().lock().write_all(text.as_bytes()).ok();
}

/// The variable that gives the role, without which there is no configuration.
const ROLE_VARIABLE: &str = "LMCACHE_PD_ROLE";

#[cfg(test)]
mod tests;
