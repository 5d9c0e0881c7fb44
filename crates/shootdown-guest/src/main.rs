//! The first and only program of a guest. It does one job with the guest's disks, prints the
//! results on the console in lines `GUEST {…}` with one JSON object each, and powers the guest off.
//! `guest.job=` on the kernel's command line names the job.

#[cfg(target_os = "linux")]
mod disk;
#[cfg(target_os = "linux")]
mod exit;
#[cfg(target_os = "linux")]
mod in_flight;
#[cfg(target_os = "linux")]
mod pattern;
#[cfg(target_os = "linux")]
mod pci;
#[cfg(target_os = "linux")]
mod speed;
#[cfg(target_os = "linux")]
mod system;
#[cfg(target_os = "linux")]
mod vfio;
#[cfg(target_os = "linux")]
mod virtio;

#[cfg(target_os = "linux")]
fn main() {
    use system::{Options, Result};

    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Processes that the job `vfio-exit` starts.
    match arguments.split_first() {
        Some((first, rest)) if first == "reader" => {
            return exit::reader(rest).expect("a reader that ends has failed");
        }
        Some((first, rest)) if first == "neighbour" => {
            return exit::neighbour(rest).expect("memory can be watched");
        }
        _ => assert_eq!(std::process::id(), 1, "this is the first process of a guest"),
    }
    let job = || -> Result<()> {
        system::mount_all()?;
        let options = Options::read()?;
        let job: String = options.get("job", String::new())?;
        system::load_modules(if job.starts_with("vfio") { "vfio" } else { "disk" })?;
        match job.as_str() {
            "disk" => disk::run(&options),
            "speed" => speed::run(&options),
            "vfio" => in_flight::run(&options, 1),
            "vfio-pair" => in_flight::run(&options, 2),
            "vfio-exit" => exit::run(&options),
            _ => Err(format!("guest.job={job} is not known").into()),
        }
    };
    let result =
        std::panic::catch_unwind(job).unwrap_or_else(|_| Err("the program has panicked".into()));
    match result {
        Ok(()) => system::report(r#"{"end":true}"#),
        Err(error) => system::report(&format!(
            r#"{{"error":"{}"}}"#,
            error.to_string().replace(['"', '\\'], "'")
        )),
    }
    system::power_off();
}

#[cfg(not(target_os = "linux"))]
fn main() {}
