package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
)

// notListening returns those of the TCP ports that no socket of the user listens on in this network namespace, for every address.
func notListening(uid int, ports ...uint16) ([]uint16, error) {
	open := map[uint16]bool{}
	for _, file := range []string{"/proc/thread-self/net/tcp6", "/proc/thread-self/net/tcp"} {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		for _, s := range listeners(text) {
			if s.uid == uid && s.any {
				open[s.port] = true
			}
		}
	}
	var closed []uint16
	for _, p := range ports {
		if !open[p] {
			closed = append(closed, p)
		}
	}
	return closed, nil
}

// listener is a listening TCP socket.
type listener struct {
	any  bool // on the unspecified address
	port uint16
	uid  int
}

// listeners reads the format of /proc/net/tcp and tcp6 (proc_pid_net(5)): index, local address:port and remote address:port in
// hexadecimal, state (0A: listening), queues, timer, retransmits, uid.
func listeners(text []byte) []listener {
	var found []listener
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 8 || string(f[3]) != "0A" {
			continue
		}
		addr, port, ok := bytes.Cut(f[1], []byte(":"))
		p, err := strconv.ParseUint(string(port), 16, 16)
		uid, uerr := strconv.Atoi(string(f[7]))
		if !ok || err != nil || uerr != nil {
			continue
		}
		found = append(found, listener{any: len(bytes.Trim(addr, "0")) == 0, port: uint16(p), uid: uid})
	}
	return found
}

func portList(ports []uint16) string {
	s := fmt.Sprint(ports)
	return s[1 : len(s)-1]
}
