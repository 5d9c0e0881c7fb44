//! QEMU's own device: that the guest and the rig work is seen with it, and it is what speed is
//! compared with.

use crate::disk::check_words;
use crate::rig::{Seen, Served, Setup};
use serde_json::Value;

crate::list![
    the_guest_reads_what_it_has_written,
    the_guest_notices_foreign_words,
    the_guest_survives_a_killed_driver
];
crate::list![fn tests_of_both: reads_of_a_guest_with_and_without_an_iommu];

const BY_QEMU: Served = Served::Qemu { throttle: 0 };
/// A read takes a tenth of a second.
const SLOW: Served = Served::Qemu { throttle: 5 };

fn the_guest_reads_what_it_has_written() {
    let seen = Setup { served: BY_QEMU, devices: 2, queues: 2, cpus: 2, ..Setup::default() }
        .boot()
        .whole();
    seen.print("QEMU's own");
    check_words(&seen, 2);
    assert_eq!(seen.each("queues"), [2, 2]);
}

/// QEMU's own device has translated before it reads, and an unmap waits for nothing.
fn the_guest_notices_foreign_words() {
    for (job, devices) in [("vfio", 1), ("vfio-pair", 2)] {
        let set = vec![("rounds", 5)];
        let setup = Setup {
            served: SLOW,
            job,
            set,
            devices,
            shared_slot: true,
            filled: true,
            mib: 4,
            ..Setup::default()
        };
        let seen = setup.boot().whole();
        println!(
            "{job}: unmap {:?} us, {:?} foreign words",
            seen.each("unmap_us"),
            seen.each("foreign")
        );
        assert_eq!(seen.results.len(), 5);
        assert_eq!(seen.sum("wrong"), 0, "{:?}", seen.results);
        assert!(seen.sum("foreign") > 0, "{:?}", seen.results);
    }
}

/// QEMU drains its own device when that is reset.
fn the_guest_survives_a_killed_driver() {
    let set = vec![("rounds", 3)];
    let seen =
        Setup { served: SLOW, job: "vfio-exit", set, filled: true, mib: 4, ..Setup::default() }
            .boot()
            .whole();
    seen.print("QEMU's own, exit");
    assert_eq!(seen.results.len(), 3);
    assert_eq!((seen.sum("wrong"), seen.sum("changed")), (0, 0), "{:?}", seen.results);
    assert!(seen.results.iter().all(|result| result["crashed"] == false), "{:?}", seen.results);
}

fn reads_of_a_guest_with_and_without_an_iommu() {
    let speed = |served, iommu| -> Seen {
        Setup {
            served,
            iommu,
            job: "speed",
            set: vec![("ms", 400)],
            filled: true,
            ..Setup::default()
        }
        .boot()
        .whole()
    };
    let (ours, theirs, plain) =
        (speed(Served::Processes, true), speed(BY_QEMU, true), speed(BY_QEMU, false));
    let iops = |result: &Value| result["iops"].as_f64().unwrap();
    println!(
        "reads per second, block and queue depth: this back-end; QEMU's own device, with the IOMMU and without"
    );
    assert_eq!((ours.results.len(), theirs.results.len(), plain.results.len()), (4, 4, 4));
    for ((ours, theirs), plain) in ours.results.iter().zip(&theirs.results).zip(&plain.results) {
        let [x, y, z] = [ours, theirs, plain].map(iops);
        println!(
            "{:>6} {:>3}: {x:>8.0}; {y:>8.0} ({:.2}), {z:>8.0} ({:.2})",
            ours["block"],
            ours["depth"],
            x / y,
            x / z
        );
        assert!(x > 0.0 && y > 0.0 && z > 0.0);
    }
}
