//! Packs the initramfs of a guest: `image KERNEL INIT FILE`, with the root of an unpacked kernel
//! package, the program for the first process, and the file to write.
#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kernel, init, file] = arguments.as_slice() else {
        return Err("image KERNEL INIT FILE".into());
    };
    pack::pack(kernel.as_ref(), init.as_ref(), file.as_ref())
}

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
mod pack {
    use std::collections::{BTreeMap, HashMap};
    use std::error::Error;
    use std::fs;
    use std::io::Cursor;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    type Result<T> = std::result::Result<T, Box<dyn Error>>;

    /// The lists of modules that the program loads, with their parameters. Modules that they depend
    /// on come first.
    const LISTS: [(&str, &[&str]); 2] = [
        ("disk", &["virtio_pci", "virtio_blk"]),
        // Interrupts are not remapped. Polling drivers do not need that.
        ("vfio", &["vfio_iommu_type1 allow_unsafe_interrupts=1", "vfio_pci"]),
    ];

    pub(crate) fn pack(kernel: &Path, init: &Path, file: &Path) -> Result<()> {
        let mut modules = Modules::find(kernel)?;
        let mut files = vec![("init".to_owned(), 0o755, fs::read(init)?)];
        for (list, wanted) in LISTS {
            let mut order = Vec::new();
            for module in wanted {
                let (name, parameters) = module.split_once(' ').unwrap_or((module, ""));
                modules.load(name, parameters, &mut order)?;
            }
            files.push((format!("modules/{list}"), 0o644, (order.join("\n") + "\n").into_bytes()));
        }
        let loaded = modules.contents.into_iter();
        files.extend(loaded.map(|(name, content)| (format!("modules/{name}.ko"), 0o644, content)));
        let folder = (cpio::NewcBuilder::new("modules").mode(0o40755), Cursor::new(Vec::new()));
        let entries = files.into_iter().map(|(name, mode, content)| {
            let entry = cpio::NewcBuilder::new(&name).mode(0o100_000 | mode);
            (entry, Cursor::new(content))
        });
        // Whole or not at all: another test may read the file.
        let unfinished = file.with_extension(format!("{}.part", std::process::id()));
        cpio::write_cpio([folder].into_iter().chain(entries), fs::File::create(&unfinished)?)?;
        Ok(fs::rename(unfinished, file)?)
    }

    /// Modules by their names, with `-` replaced by `_`.
    struct Modules {
        files: HashMap<String, PathBuf>,
        builtin: String,
        contents: BTreeMap<String, Vec<u8>>,
    }

    impl Modules {
        fn find(kernel: &Path) -> Result<Self> {
            // Packages have them there since the merge of /usr.
            let roots = [kernel.join("lib/modules"), kernel.join("usr/lib/modules")];
            let root = roots
                .iter()
                .find(|root| root.is_dir())
                .ok_or(format!("{} has no modules", kernel.display()))?;
            let version =
                fs::read_dir(root)?.next().ok_or(format!("{} is empty", root.display()))??.path();
            let mut files = HashMap::new();
            collect(&version.join("kernel"), &mut files)?;
            Ok(Self {
                files,
                builtin: fs::read_to_string(version.join("modules.builtin"))?,
                contents: BTreeMap::new(),
            })
        }

        /// Appends a module to the order, after the modules that it needs and that are not in it
        /// yet.
        fn load(&mut self, name: &str, parameters: &str, order: &mut Vec<String>) -> Result<()> {
            if order.iter().any(|line| line.split(' ').next() == Some(name)) {
                return Ok(());
            }
            let Some(file) = self.files.get(name) else {
                let builtin = self
                    .builtin
                    .lines()
                    .any(|line| module(Path::new(line)).as_deref() == Some(name));
                return if builtin {
                    Ok(())
                } else {
                    Err(format!("the kernel has no module {name}").into())
                };
            };
            let content = unpacked(file)?;
            for needed in depends(&content) {
                self.load(&needed, "", order)?;
            }
            order.push(format!("{name} {parameters}").trim_end().to_owned());
            self.contents.insert(name.to_owned(), content);
            Ok(())
        }
    }

    /// Returns the name of the module in the file, if it is one: `a-b.ko.xz` contains `a_b`.
    fn module(file: &Path) -> Option<String> {
        let (name, rest) = file.file_name()?.to_str()?.split_once(".ko")?;
        let known = ["", ".xz", ".zst", ".gz"].contains(&rest);
        known.then(|| name.replace('-', "_"))
    }

    fn collect(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                collect(&path, files)?;
            } else if let Some(name) = module(&path) {
                files.insert(name, path);
            }
        }
        Ok(())
    }

    /// Returns the contents of a module. Tools of the system decompress it.
    fn unpacked(file: &Path) -> Result<Vec<u8>> {
        let tool = match file.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => "xz",
            Some("zst") => "zstd",
            Some("gz") => "gzip",
            _ => return Ok(fs::read(file)?),
        };
        let output = Command::new(tool)
            .arg("-dc")
            .arg(file)
            .output()
            .map_err(|error| format!("{tool}: {error}"))?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(format!("{tool} cannot unpack {}", file.display()).into())
        }
    }

    /// Returns the names of the modules that a module depends on.
    fn depends(content: &[u8]) -> Vec<String> {
        const KEY: &[u8] = b"\0depends=";
        let Some(start) = content.windows(KEY.len()).position(|window| window == KEY) else {
            return Vec::new();
        };
        let names =
            content[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
        let names = String::from_utf8_lossy(names).replace('-', "_");
        names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }
}
