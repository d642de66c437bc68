// Package traffic makes connections from within a pod, and says what came of them: cmd/traffic is the program that runs there.
//
//	traffic try ADDRESS…    one attempt at each, a JSON line for each
//	traffic flood ADDRESS…  attempts without end, and what came of all of them so far as JSON lines: the pod's log
//	traffic stream ADDRESS… one connection to each for as long as it lasts, and what came of it so far as JSON lines
//	traffic echo ADDRESS    what streams lead to
//
// The servers of attempts are agnhost's: they answer GET /hostname with their pod's name.
package traffic

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Outcome is what became of one attempt.
type Outcome string

// The outcomes. Whatever is denied has to be Refused: by connect() itself, and not after it.
const (
	Reached    Outcome = "reached"    // connected, and the server answered
	Refused    Outcome = "refused"    // connect() said ECONNREFUSED
	Silent     Outcome = "silent"     // nobody answered the connect() in time
	Cut        Outcome = "cut"        // connected, but no answer came
	Unresolved Outcome = "unresolved" // the name has no address
	Failed     Outcome = "failed"     // connect() said something else
)

// Attempt is one connection to an address.
type Attempt struct {
	To      string        `json:"to"`
	Outcome Outcome       `json:"outcome"`
	Host    string        `json:"host,omitempty"`  // Reached: the pod that answered
	Error   string        `json:"error,omitempty"` // of any other
	Took    time.Duration `json:"took"`            // ns
}

// Patience bounds the connect() of an attempt, and again the answer.
const Patience = 5 * time.Second

// Try connects to "host:port" once, by a connection of its own, and asks for the server's name.
func Try(ctx context.Context, to string) (a Attempt) {
	began := time.Now()
	a.To = to
	defer func() { a.Took = time.Since(began) }()
	conn, err := (&net.Dialer{Timeout: Patience, KeepAlive: -1}).DialContext(ctx, "tcp", to)
	if err != nil {
		a.Outcome, a.Error = refusal(err), err.Error()
		return a
	}
	defer conn.Close()
	host, err := ask(conn)
	if err != nil {
		a.Outcome, a.Error = Cut, err.Error()
		return a
	}
	a.Outcome, a.Host = Reached, host
	return a
}

func refusal(err error) Outcome {
	var unresolved *net.DNSError
	switch {
	case errors.As(err, &unresolved):
		return Unresolved
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		return Silent
	}
	return Failed
}

func ask(conn net.Conn) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(Patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "GET /hostname HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	host, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return strings.TrimSpace(string(host)), err
}
