// Command node is the first process of a machine of a test cluster: it makes new namespaces look like a machine, and is their init. When it
// is killed, the kernel ends all that runs in them, and what was mounted, linked and configured in them is gone.
//
// It is started in new mount, network, PID, IPC and UTS namespaces. Descriptor 3 hears what failed, or is closed without a word when the
// machine is ready.
//
//	node HOSTNAME DIRECTORY
//
// The directory, on a file system that an overlay can be on, keeps all that the machine writes.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	report := os.NewFile(3, "report")
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, syscall.SIGCHLD)
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if len(os.Args) != 3 || os.Getpid() != 1 {
		fmt.Fprintln(report, "usage: node HOSTNAME DIRECTORY, as the first process of a PID namespace")
		os.Exit(2)
	}
	if err := become(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(report, err)
		os.Exit(1)
	}
	report.Close()
	for range signals {
		for { // one SIGCHLD may stand for several children
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); err != nil || pid <= 0 {
				break
			}
		}
	}
}

func become(hostname, directory string) error {
	if err := syscall.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	// Nothing that is mounted here reaches the host; inside, mounts propagate, as Kubernetes asks for (mountPropagation).
	for _, how := range []uintptr{syscall.MS_PRIVATE, syscall.MS_SHARED} {
		if err := syscall.Mount("", "/", "", syscall.MS_REC|how, ""); err != nil {
			return fmt.Errorf("set the propagation of mounts: %w", err)
		}
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := directories(directory); err != nil {
		return err
	}
	return settings(map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/ipv6/conf/all/forwarding":        "1",
		"net/ipv4/conf/all/route_localnet":    "1", // node ports of 127.0.0.1
		"net/bridge/bridge-nf-call-iptables":  "1", // of one node's pods through a service to each other: the answer passes the node's rules, too
		"net/bridge/bridge-nf-call-ip6tables": "1",
	})
}

// directories gives the machine its own of those that software on a node writes to, at their usual places. What the host has in them is seen
// until it is written to.
func directories(directory string) error {
	for _, d := range []string{"/etc", "/opt", "/var/lib", "/var/log"} {
		upper, work := filepath.Join(directory, "upper", d), filepath.Join(directory, "work", d)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		if err := syscall.Mount("overlay", d, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", d, upper, work)); err != nil {
			return fmt.Errorf("mount an overlay on %s: %w", d, err)
		}
	}
	// Not through the overlay, because containerd's snapshots are overlays themselves, and one cannot be kept in another.
	for _, d := range []string{"/var/lib/containerd", "/var/lib/kubelet"} {
		own := filepath.Join(directory, filepath.Base(d))
		if err := errors.Join(os.MkdirAll(own, 0o711), os.MkdirAll(d, 0o711)); err != nil {
			return err
		}
		if err := syscall.Mount(own, d, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", d, err)
		}
		if err := syscall.Mount("", d, "", syscall.MS_SHARED, ""); err != nil {
			return fmt.Errorf("share the mounts under %s: %w", d, err)
		}
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := syscall.Mount("", "/run", "", syscall.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts under /run: %w", err)
	}
	return errors.Join(os.MkdirAll("/opt/cni/bin", 0o755), os.MkdirAll("/etc/cni/net.d", 0o755), os.MkdirAll("/var/log/pods", 0o755))
}

// settings are of this network namespace; one that this kernel does not have is left out.
func settings(all map[string]string) error {
	for name, value := range all {
		err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
