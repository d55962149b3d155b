//! Completions for shells and manual pages, made from a program's own definition of its command line.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

/// Arguments of `completions`.
#[derive(Clone, Debug, Args)]
pub struct Completions {
    /// The shell for which the script is.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Arguments of `manual`.
#[derive(Clone, Debug, Args)]
pub struct Manual {
    /// The folder for the pages; it is made if it does not exist.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

impl Completions {
    /// Prints the script that completes the command line of `program`.
    pub fn print(&self, mut program: Command) {
        let mut script = Vec::new();
        let name = program.get_name().to_owned();
        clap_complete::generate(self.shell, &mut program, name, &mut script);
        // A closed pipe, for example to `head`, is not an error.
        io::stdout().lock().write_all(&script).ok();
    }
}

impl Manual {
    /// Writes a page for `program` and for each of its subcommands.
    ///
    /// # Errors
    /// The folder or a file in it cannot be written.
    pub fn write(&self, program: Command) -> io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        clap_mangen::generate_to(program, &self.folder)
    }
}
