package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// findByAgent finds the network namespace of a pod whose agent listens in its volume: the agent's own. The kernel says which process listens; that
// it is one of the pod's is what its control group says, which the kubelet and the container runtime choose. An error that is os.ErrNotExist:
// no agent listens.
func findByAgent(uid, volume string) (pod, error) {
	conn, cred, err := connect(volume)
	if errors.Is(err, unix.ECONNREFUSED) {
		err = errors.Join(err, os.ErrNotExist)
	}
	if err != nil {
		return pod{}, err
	}
	defer conn.Close()
	pid := int(cred.Pid)
	if pid == 0 {
		return pod{}, errors.New("the agent's process is not seen here: the daemon needs hostPID")
	}
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	open := func() (*os.File, error) { return netnsOf(pid, uid, path) }
	f, err := open()
	if err != nil {
		return pod{}, err
	}
	f.Close()
	return pod{key: uid, name: "uid:" + uid, uid: uid, netns: path, open: open, found: true}, nil
}

// netnsOf opens the network namespace of a process, if that is one of a pod.
func netnsOf(pid int, uid, path string) (*os.File, error) {
	if err := belongs(pid, uid); err != nil {
		return nil, err
	}
	f, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	if err := belongs(pid, uid); err != nil { // the number may have gone to another process between
		f.Close()
		return nil, err
	}
	return f, nil
}

// belongs fails unless a process is in a pod's control group.
func belongs(pid int, uid string) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, unix.ESRCH) {
		return os.ErrNotExist
	}
	if err != nil {
		return err
	}
	if !inPod(text, uid) {
		return fmt.Errorf("process %d, which listens on the agent's socket, is in no control group of pod %s", pid, uid)
	}
	return nil
}

// inPod reads the format of /proc/PID/cgroup (cgroups(7)) and looks for the folder that the kubelet makes for a pod: pod<UID> with the driver cgroupfs, and
// kubepods[-<class>]-pod<UID with _ for ->.slice with systemd.
func inPod(cgroup []byte, uid string) bool {
	slice := "-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	for line := range bytes.Lines(cgroup) {
		fields := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(fields) != 3 {
			continue
		}
		for _, folder := range strings.Split(fields[2], "/") {
			if folder == "pod"+uid || strings.HasPrefix(folder, "kubepods") && strings.HasSuffix(folder, slice) {
				return true
			}
		}
	}
	return false
}
