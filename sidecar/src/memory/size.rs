//! Formats numbers of bytes for people.

/// A number of bytes that is printed with a unit, such as `1.50 GiB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size(pub(crate) u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The loss of precision does not matter, because only two decimals are printed.
        #[allow(clippy::cast_precision_loss)]
        let bytes = self.0 as f64;
        for (unit, scale) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << scale {
                #[allow(clippy::cast_precision_loss)]
                return write!(f, "{:.2} {unit}", bytes / (1_u64 << scale) as f64);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}
